#!/usr/bin/env bash
# Runs a command as N processes of one jax.distributed job on this machine, over loopback:
#
#   launch/local.sh [--dry-run] N -- COMMAND ARGUMENTS...
#   launch/local.sh 2 -- python -m kto_jax.train --config=configs/kto_llama.py --workdir=runs/mine
#
# Each process gets JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID in its environment. SIGTERM and Ctrl-C
# are forwarded to all. If one fails, the others get SIGTERM, and SIGKILL after KTO_GRACE_SECONDS (30). After a 75
# (preempted) or a signal they first have that long to exit by themselves. The exit code is that of the first that failed.
#
# KTO_PORT: the coordinator's port (default: a free one).

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
KTO_GRACE_SECONDS=${KTO_GRACE_SECONDS:-30}
need_number KTO_GRACE_SECONDS 0
((${#WORDS[@]} == 1)) || fail "${#WORDS[@]} arguments stand before --." "Allowed: one, the number of processes." \
  "See $0 --help."
NUM_PROCESSES=${WORDS[0]}
need_number NUM_PROCESSES 1
need_command "$0 N"

listening() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

if [[ -z ${KTO_PORT:-} ]]; then
  # Below the kernel's range of ephemeral ports.
  KTO_PORT=$((20000 + RANDOM % 12000))
  while listening "$KTO_PORT"; do KTO_PORT=$((20000 + RANDOM % 12000)); done
fi
need_number KTO_PORT 1
address=127.0.0.1:$KTO_PORT

declare -A rank_of=()
watchdog=
SIGNALLED=0

signal_all() {
  local child
  for child in "${!rank_of[@]}"; do kill -s "$1" -- "-$child" 2>/dev/null || true; done
}

# end_others CODE: ends the remaining processes after one exited with CODE, without waiting here.
end_others() {
  (
    if (($1 == PREEMPTED || SIGNALLED)); then sleep "$KTO_GRACE_SECONDS"; fi
    signal_all TERM
    sleep "$KTO_GRACE_SECONDS"
    signal_all KILL
  ) &
  watchdog=$!
}

# shellcheck disable=SC2329 # the trap calls it
leave() {
  # No process outlives this script.
  signal_all KILL
  [[ -z $watchdog ]] || kill -KILL -- "-$watchdog" 2>/dev/null || true
}

# Job control gives every process its own group, so that its children are signalled, too.
set -m
trap leave EXIT
trap 'SIGNALLED=1; signal_all TERM' TERM
trap 'SIGNALLED=1; signal_all INT' INT
for ((rank = 0; rank < NUM_PROCESSES; rank++)); do
  place=("JAX_COORDINATOR_ADDRESS=$address" "JAX_COORDINATOR_BIND_ADDRESS=$address"
    "JAX_NUM_PROCESSES=$NUM_PROCESSES" "JAX_PROCESS_ID=$rank")
  if ((DRY_RUN)); then
    run env "${place[@]}" "${COMMAND[@]}"
  else
    env "${place[@]}" "${COMMAND[@]}" </dev/null &
    rank_of[$!]=$rank
  fi
done

first=0
while ((${#rank_of[@]})); do
  code=0
  wait -n -p ended "${!rank_of[@]}" || code=$?
  # Without a process id, a signal ended the wait.
  [[ -n ${ended:-} ]] || continue
  if ((code)); then
    say "process ${rank_of[$ended]} ended with exit code $code"
    unset "rank_of[$ended]"
    if ((first == 0)); then
      first=$code
      end_others "$code"
    fi
  else
    unset "rank_of[$ended]"
  fi
done
exit "$first"
