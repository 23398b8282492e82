#!/usr/bin/env bash
# Downloads the wheels of benchmarks/gpu_wheels.txt into .whl/, which git ignores, for a GPU machine without a network.
# It then carries the repository with .whl/, and benchmarks/gpu.sh installs them there. At most 50 MiB together.
set -euo pipefail
cd "$(dirname "$0")/.."
platforms=(--platform manylinux1_x86_64)
for glibc in 2_17 2_24 2_27 2_28 2_31 2_34 2_35 2_39; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
rm -rf .whl
python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
  --platform manylinux2014_x86_64 "${platforms[@]}" -d .whl -r benchmarks/gpu_wheels.txt
megabytes=$(du -sm .whl | cut -f1)
echo "$(find .whl -name '*.whl' | wc -l) wheels, $megabytes MiB in .whl/"
((megabytes <= 50)) || { echo "more than 50 MiB: drop a wheel from benchmarks/gpu_wheels.txt" >&2; exit 1; }
