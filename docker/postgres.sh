#!/bin/sh
# PostgreSQL in its container: at the first start it makes its password and its database, then it serves.
set -eu
umask 077
key=/database-key/pgpass
data=/var/lib/facefed/postgres
if [ ! -s "$key" ]; then # MLflow's container looks for this file, so it comes before anything else
    password=$(head -c 32 /dev/urandom | base64 | tr -d '+/=\n')
    echo "postgres:5432:*:facefed:$password" >"$key.new"
    mv "$key.new" "$key"
fi
if [ ! -s "$data/PG_VERSION" ]; then
    rm -rf "$data.new"
    cut -d: -f5 "$key" >/tmp/password
    initdb --pgdata="$data.new" --username=facefed --pwfile=/tmp/password --auth=scram-sha-256 --encoding=UTF8 \
        --locale=C.UTF-8
    rm /tmp/password
    echo 'host all facefed all scram-sha-256' >>"$data.new/pg_hba.conf"
    echo 'CREATE DATABASE facefed' | postgres --single -D "$data.new" postgres
    mv "$data.new" "$data"
fi
exec postgres -D "$data" -c listen_addresses='*' -c unix_socket_directories=/tmp
