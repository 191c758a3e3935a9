#!/bin/sh
# An environment of its own for Intel Neural Compressor 2.6, which wants an older NumPy, for benchmarks/peers.py --inc:
#
#     sh benchmarks/inc_env.sh FOLDER
set -e
python3 -m venv "$1"
"$1/bin/pip" install torch torchvision neural-compressor==2.6 six "setuptools<81"
