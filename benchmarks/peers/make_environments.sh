#!/usr/bin/env bash
# One virtual environment per peer library under the folder given: bash benchmarks/peers/make_environments.sh FOLDER
# Afterwards, for the format checks:   export FEATUREFLOW_PEERS=FOLDER   (tests look for FOLDER/<peer>/bin/python)
set -euo pipefail
folder=${1:?which folder should hold the environments?}
here=$(cd "$(dirname "$0")" && pwd)
for peer in saelens sparsify dictionary_learning circuit_tracer saedashboard; do
    [ -x "$folder/$peer/bin/python" ] || "${PYTHON:-python3}" -m venv "$folder/$peer"
    "$folder/$peer/bin/python" -m pip install --quiet --requirement "$here/requirements-$peer.txt"
done
"$folder/dictionary_learning/bin/python" -m pip uninstall --quiet --yes torchvision
"$folder/saedashboard/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio
