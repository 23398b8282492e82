#!/usr/bin/env bash
# Submits a training command to Slurm; arguments before -- are passed to sbatch:
#
#   launch/slurm.sh [--dry-run] [SBATCH OPTIONS] -- COMMAND ARGUMENTS...
#   launch/slurm.sh --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 --time=24:00:00 -- \
#     python -m kto_jax.train --config=configs/kto_llama.py --workdir=/shared/runs/mine
#
# Ask for as many tasks as GPUs per node: under Slurm, jax.distributed gives each process one. 300 s before the time limit
# every task gets SIGTERM, saves and exits with 75. The job is requeued after the codes 75 and 134 (JAX lost another
# process), and after no other.
#
# KTO_MAX_RESTARTS    requeues over the job's life (20)             KTO_PAUSE_SECONDS  pause before each (10)

#SBATCH --job-name=kto_jax
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@300

set -euo pipefail
# Slurm runs a copy of this file from its own folder, so the first run passes on the original folder.
if [[ -z ${SLURM_JOB_ID:-} ]]; then
  KTO_LAUNCH=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
fi
if [[ ! -r ${KTO_LAUNCH:-}/common.sh ]]; then
  printf 'error: %s %s %s\n' "sbatch was called on this file." "Allowed: launch/slurm.sh [SBATCH OPTIONS] -- COMMAND." \
    "Start launch/slurm.sh itself, outside of a job; it calls sbatch." >&2
  exit 2
fi
export KTO_LAUNCH
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$KTO_LAUNCH/common.sh"
parse "$@"
need_command "$0 [SBATCH OPTIONS]"
read_restart_settings 10

if [[ -z ${SLURM_JOB_ID:-} ]]; then
  need_program sbatch "it comes with Slurm; run this on a login node"
  # The job inherits this environment, secrets included: Slurm's default, and invisible on command lines.
  run sbatch "${WORDS[@]}" --export=ALL "$KTO_LAUNCH/slurm.sh" -- "${COMMAND[@]}"
  exit
fi

if [[ -n ${SLURM_GPUS_PER_TASK:-} ]]; then
  fail "--gpus-per-task=$SLURM_GPUS_PER_TASK was given." "Allowed: --gpus-per-node with as many --ntasks-per-node." \
    "With it each task sees one GPU, of which jax.distributed would take the second on the second task."
fi
# srun does not inherit it from sbatch.
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
code=0
# After a task exits with 75, the others must not be killed while they save. After a task dies, they get 10 minutes.
run_and_forward srun --kill-on-bad-exit=0 --wait=600 "${COMMAND[@]}" || code=$?
may_restart "$code" || exit "$code"
# After scancel the tasks exit with 75 as well, but the job is no longer running and must not be requeued.
[[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) == RUNNING ]] || exit "$code"
requeues=${SLURM_RESTART_COUNT:-0}
if ((requeues >= KTO_MAX_RESTARTS)); then
  say "preempted again after $requeues requeues; KTO_MAX_RESTARTS allows no more"
  exit "$code"
fi
say "preempted; requeue $((requeues + 1)) of at most $KTO_MAX_RESTARTS in $KTO_PAUSE_SECONDS s"
sleep "$KTO_PAUSE_SECONDS"
scontrol requeue "$SLURM_JOB_ID"
