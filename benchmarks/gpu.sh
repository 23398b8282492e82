#!/usr/bin/env bash
# Every figure of a GPU by one command, in under 9 minutes: correctness, steps, memory, TRL, Liger's head, decoding.
#
#   bash benchmarks/gpu.sh                # all parts, results in $OUT or benchmarks/results/gpu/
#   bash benchmarks/gpu.sh --rehearse     # the same at toy size on the CPU
#   bash benchmarks/gpu.sh --parts trl    # named parts alone
#
# The machine has the packages that benchmarks/gpu_wheels.txt names first, and no network. `benchmarks/gpu_wheels.sh`
# fetches the others into .whl/ beforehand, and they are installed here into a folder of their own. A part whose figures
# are in gpu.json already is skipped, so the same command resumes.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
site=${KTO_JAX_SITE:-/tmp/kto_jax_site}
if compgen -G ".whl/*.whl" >/dev/null && [[ ! -e $site ]]; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" .whl/*.whl
fi
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "$python" -m benchmarks.gpu --out "${OUT:-benchmarks/results/gpu}" "$@"
