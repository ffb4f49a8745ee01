#!/bin/sh
# Random secrets for compose.yaml in the folder secrets/ beside this file, once; what is there stays.
#
# Compose mounts them as files that keep their owner and mode. Containers run as user 10001, so the files are readable
# for all and their folder is not; on a shared machine keep the folder to root.
set -eu
umask 077

folder=${1:-$(dirname "$0")/secrets}
mkdir -p "$folder"

random() { head -c 24 /dev/urandom | base64 | tr -d '\n' | tr '+/' '-_'; }

write() { # name, content
    if [ ! -s "$folder/$1" ]; then
        printf '%s' "$2" >"$folder/$1"
        chmod 0444 "$folder/$1"
    fi
}

write PGPASSWORD "$(random)"
write REDISCLI_AUTH "$(random)"
write PREFECT_API_AUTH_STRING "slimline:$(random)"
write MLFLOW_AUTH_ADMIN_PASSWORD "$(random)"
write MLFLOW_TRACKING_PASSWORD "$(random)"
write MLFLOW_FLASK_SERVER_SECRET_KEY "$(random)"
write AWS_ACCESS_KEY_ID slimline
write AWS_SECRET_ACCESS_KEY "$(random)"
redis="redis://:$(cat "$folder/REDISCLI_AUTH")@redis:6379"
write PREFECT_REDIS_MESSAGING_URL "$redis/0"
write PREFECT_SERVER_DOCKET_URL "$redis/1"
write SLIMLINE_REDIS_URL "$redis/2"
write s3_identities "$(
    cat <<END
{"identities": [{"name": "slimline", "actions": ["Admin", "Read", "Write", "List", "Tagging"], "credentials":
  [{"accessKey": "$(cat "$folder/AWS_ACCESS_KEY_ID")", "secretKey": "$(cat "$folder/AWS_SECRET_ACCESS_KEY")"}]}]}
END
)"
echo "$folder holds the secrets of docker/compose.yaml"
