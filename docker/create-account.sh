#!/bin/sh
# Makes the account of MLflow's that workers use, so that none of them holds the admin's; nothing where it is there.
#
# MLFLOW_URL, MLFLOW_AUTH_ADMIN_USERNAME and _PASSWORD; the new one: MLFLOW_TRACKING_USERNAME and _PASSWORD.
set -eu

exec python -c '
import base64, json, os, sys, urllib.error, urllib.request

admin = "{MLFLOW_AUTH_ADMIN_USERNAME}:{MLFLOW_AUTH_ADMIN_PASSWORD}".format(**os.environ)
new = {"username": os.environ["MLFLOW_TRACKING_USERNAME"], "password": os.environ["MLFLOW_TRACKING_PASSWORD"]}
headers = {"Content-Type": "application/json", "Authorization": "Basic " + base64.b64encode(admin.encode()).decode()}
url = os.environ["MLFLOW_URL"] + "/api/2.0/mlflow/users/create"
try:
    urllib.request.urlopen(urllib.request.Request(url, json.dumps(new).encode(), headers), timeout=30).read()
except urllib.error.HTTPError as error:
    said = error.read().decode(errors="replace")
    if "RESOURCE_ALREADY_EXISTS" not in said:
        sys.exit(f"{url}: {error}: {said[:300]}")
'
