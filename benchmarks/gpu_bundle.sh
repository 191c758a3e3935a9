#!/usr/bin/env bash
# A folder of wheels, at most 60 MiB, that a GPU machine without network needs beside torch, torchvision, transformers and timm
# to run `benchmarks/gpu.py` and `pytest -m cuda tests/cuda`: gsprune itself and what it imports (tracking=none: no MLflow).
#
#     benchmarks/gpu_bundle.sh FOLDER [PYTHON_VERSION]        # 3.12 unless told
#
# There, in a checkout of this repository:
#
#     python -m pip install --no-index --find-links FOLDER --no-deps FOLDER/*.whl
#     python benchmarks/gpu.py && python -m pytest -m cuda tests/cuda
set -euo pipefail
folder=$1 python=${2:-3.12}
cd "$(dirname "$0")/.."
mkdir -p "$folder"
fetch() {
    python -m pip download --quiet --no-deps --only-binary :all: --python-version "$python" --dest "$folder" "$@"
}
python -m pip wheel --quiet --no-deps --wheel-dir "$folder" .
fetch 'hydra-core>=1.3.2,<1.4' 'omegaconf>=2.3,<2.4' 'PyYAML>=6' 'packaging>=23' 'safetensors>=0.4.5,<1'
fetch 'rich>=13.9.4,<16' 'markdown-it-py>=3' 'mdurl>=0.1' 'pygments>=2.15' 'filelock>=3.20.3,<5'
fetch 'pytest>=8,<10' 'pytest-xdist>=3.6,<4' 'execnet>=2.1' 'pluggy>=1.5' 'iniconfig>=2'
python -m pip wheel --quiet --no-deps --wheel-dir "$folder" 'antlr4-python3-runtime==4.9.*'  # Hydra 1.3's; a source package
kib=$(du -sk "$folder" | cut -f1)
echo "$folder: $(ls "$folder" | wc -l) wheels, $((kib / 1024)) MiB"
test "$kib" -le $((60 * 1024)) || { echo "more than 60 MiB" >&2; exit 1; }
