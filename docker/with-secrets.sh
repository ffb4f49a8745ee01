#!/bin/sh
# Runs a command with the secrets of this container as environment variables.
#
# Every file in SECRETS_DIR (default /run/secrets) that is named like a variable, PGPASSWORD say, becomes the variable
# of its name. So secrets are in no image, no compose file and no `docker inspect`. What the environment has already
# set stays.
set -eu

for file in "${SECRETS_DIR:-/run/secrets}"/*; do
    name=${file##*/}
    case $name in
        '' | *[!A-Z0-9_]* | [0-9]*) continue ;; # no variable's name; or the pattern itself, where there is no file
    esac
    if [ -z "$(printenv "$name" || true)" ]; then
        value=$(cat "$file")
        export "$name=$value"
    fi
done
exec "$@"
