#!/usr/bin/env bash
# torch_versions.sh FOLDER VERSION...: builds one wheel and runs the op tests against it, unchanged, on each version of
# torch, in an environment of its own, FOLDER/VERSION, made on first use (5 GB with a CUDA build of torch). Tests that
# compile the sources are left out.
# tests/bench/torch_versions.sh ~/.cache/yolonas/torch-versions 2.11.0 2.13.0 2.15.0
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$(realpath -m "${1:?usage: torch_versions.sh FOLDER VERSION...}")
shift
rm -rf "$folder/wheel" "$folder/build"
python3 -m pip wheel -q --no-deps -w "$folder/wheel" --config-settings build-dir="$folder/build" .
wheel=("$folder"/wheel/*.whl)
# A copy of the tests alone: `yolonas` can only be the installed wheel.
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
mkdir "$copy/tests"
cp -r --parents pyproject.toml csrc/README.md tests/conftest.py tests/ops "$copy/tests"
if [ -e ../shared ]; then ln -s "$(realpath ../shared)" "$copy/shared"; fi
echo "$(basename "${wheel[0]}") of $(git describe --always --dirty), sha256 $(sha256sum "${wheel[0]}" | cut -c -16)"
for version in "$@"; do
    python="$folder/$version/bin/python"
    if [ ! -e "$python" ]; then
        python3 -m venv "$folder/$version"
        "$python" -m pip install -q --no-cache-dir "torch==$version" numpy pytest pytest-timeout hypothesis
    fi
    "$python" -m pip install -q --no-deps --force-reinstall "${wheel[0]}"
    printf 'torch %s: ' "$("$python" -c 'import torch; print(torch.__version__)')"
    (cd "$copy/tests" && "$python" -m pytest -q tests/ops --ignore=tests/ops/test_{cuda_sources,cpp,fuzz}.py) | tail -1
done
