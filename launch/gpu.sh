#!/usr/bin/env bash
# Runs a training command on this GPU node and restarts it after the exit codes 75 (preempted) and 134, and after no other:
#
#   launch/gpu.sh [--dry-run] -- COMMAND ARGUMENTS...
#   launch/gpu.sh -- python -m kto_jax.train --config=configs/kto_llama.py --workdir=runs/mine
#
# One process drives all GPUs of the node. SIGTERM and Ctrl-C are forwarded to the training process, which saves; a run
# that is stopped this way is not restarted. The exit code is the last run's.
#
# KTO_IMAGE           run in this image of launch/Dockerfile.cuda, through docker
# KTO_FOLDER          with KTO_IMAGE: this folder of the node is /runs in the container (default: runs)
# KTO_SECRETS         with KTO_IMAGE: names of variables to pass on (default: HF_TOKEN WANDB_API_KEY)
# KTO_MAX_RESTARTS    restarts in a row (20)          KTO_PAUSE_SECONDS  pause before each (10)
# KTO_RESET_SECONDS   a run that lasted this long (1800) resets the count

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
no_words "$0 [--dry-run] -- COMMAND ARGUMENTS..."
need_command "$0"
read_restart_settings 10

if [[ -n ${KTO_IMAGE:-} ]]; then
  need_program docker "https://docs.docker.com/engine/install, with the NVIDIA container toolkit"
  KTO_FOLDER=${KTO_FOLDER:-runs}
  ((DRY_RUN)) || mkdir -p "$KTO_FOLDER"
  # --init: as process 1, Python would ignore SIGTERM until it sets a handler. --env NAME: docker reads the value itself.
  docker=(docker run --rm --init --gpus=all --ipc=host "--user=$(id -u):$(id -g)" --env=HOME=/tmp
    "--volume=$(realpath -m "$KTO_FOLDER"):/runs")
  names=$(secret_names)
  for name in $names; do docker+=("--env=$name"); done
  COMMAND=("${docker[@]}" "$KTO_IMAGE" "${COMMAND[@]}")
fi

if ((DRY_RUN)); then
  run "${COMMAND[@]}"
else
  restart_while_preempted run_and_forward "${COMMAND[@]}"
fi
