#!/bin/sh
# Install the peers into PEERS/mergekit and PEERS/fusion_bench, each in a virtual environment of its own.
#     sh setup_peers.sh PEERS
set -eu
peers=${1:?usage: sh setup_peers.sh PEERS}
python=${PYTHON:-python3}
for pair in mergekit=mergekit==0.1.5 fusion_bench=fusion-bench==0.2.33; do
    environment=$peers/${pair%%=*}
    test -e "$environment/.installed" && continue
    "$python" -m venv "$environment"
    "$environment/bin/pip" install --quiet --disable-pip-version-check "${pair#*=}"
    touch "$environment/.installed"
done
