#!/bin/sh
# Whether the server of this container answers a real request: healthy mlflow | prefect | worker
#
# /health of MLflow answers while every client is refused for its Host header or the database is gone, so the API is
# asked, with the server's own credentials.
set -eu

case ${1:-} in
    mlflow)
        url=http://127.0.0.1:5000/api/2.0/mlflow/experiments/search
        body='{"max_results": 1}'
        account="${MLFLOW_AUTH_ADMIN_USERNAME:-admin}:${MLFLOW_AUTH_ADMIN_PASSWORD:-}"
        ;;
    prefect)
        url=http://127.0.0.1:4200/api/flows/count
        body='{}'
        account=${PREFECT_SERVER_API_AUTH_STRING:-}
        ;;
    worker)
        url=http://127.0.0.1:8080/health
        body=
        account=
        ;;
    *)
        echo "healthy mlflow | prefect | worker; got '${1:-}'" >&2
        exit 2
        ;;
esac

URL=${HEALTHY_URL:-$url} BODY=$body ACCOUNT=$account exec python -c '
import base64, os, sys, urllib.error, urllib.request

account = base64.b64encode(os.environ["ACCOUNT"].encode()).decode()
headers = {"Content-Type": "application/json", "Authorization": f"Basic {account}"}
if account == "":
    del headers["Authorization"]
request = urllib.request.Request(os.environ["URL"], os.environ["BODY"].encode() or None, headers)
try:
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5).read()
except (OSError, urllib.error.HTTPError) as error:
    sys.exit(f"{request.full_url}: {error}")
'
