#!/usr/bin/env bash
# Makes vLLM on this machine sample from a policy: stops the server that it started before, starts one on the folder,
# and ends when that answers. kto_jax.online --hand_over calls it with the folder of each policy.
#
#   bash launch/vllm_restart.sh PORT NAME FOLDER        the first server, on the initial model
#   python -m kto_jax.online ... --sample_from=http://127.0.0.1:PORT/v1 --sample_model=NAME \
#       --hand_over="bash launch/vllm_restart.sh PORT NAME"
#
# Settings in the environment:
#   KTO_VLLM          the program (vllm)
#   KTO_VLLM_FLAGS    more flags of vllm serve, separated by spaces
#   KTO_VLLM_STATE    folder of the server's log and process id (the folder of temporary files)

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "$@"
((${#WORDS[@]} == 3)) || fail "${#WORDS[@]} arguments were given." "Allowed: vllm_restart.sh PORT NAME FOLDER." \
  "See $0 --help."
port=${WORDS[0]} name=${WORDS[1]} folder=${WORDS[2]}
state=${KTO_VLLM_STATE:-${TMPDIR:-/tmp}}/vllm_$port
flags=()
read -ra flags <<<"${KTO_VLLM_FLAGS:-}"
serve=("${KTO_VLLM:-vllm}" serve "$folder" --served-model-name "$name" --host 127.0.0.1 --port "$port" "${flags[@]}")
if ((DRY_RUN)); then
  printf '%q ' "${serve[@]}"
  printf '\n'
  exit 0
fi

command -v curl >/dev/null || fail "There is no curl." "Allowed: a machine with curl, which asks the server whether it answers." \
  "Install curl."
answers() { curl --silent --fail --output /dev/null "http://127.0.0.1:$port/health"; }
# One that ended but was not waited for by its parent is over, too.
runs() { ps -o stat= -p "$1" | grep -qv '^Z'; }
# When a process was started, in ticks since the machine was: a process id alone may be another program's by now.
started() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; }

if [[ -e $state.pid ]]; then
  read -r before since <"$state.pid"
  if [[ $(started "$before") == "$since" ]]; then
    kill "$before"
    while runs "$before"; do sleep 0.2; done
  fi
  rm "$state.pid"
fi
if answers; then
  fail "A server that vllm_restart.sh did not start answers on port $port." "Allowed: a port that nothing uses." \
    "Stop that server, or take another port."
fi
say "starting vLLM on $folder; its log is $state.log"
# In a session of its own, so that it outlives this script and the signals of its terminal.
setsid "${serve[@]}" >"$state.log" 2>&1 </dev/null &
server=$!
echo "$server $(started "$server")" >"$state.pid"
until answers; do
  if ! runs "$server"; then
    rm "$state.pid"
    tail -n 20 "$state.log" >&2
    fail "vllm serve ended before it answered; above is the end of $state.log." "Allowed: a server that starts." \
      "Correct KTO_VLLM_FLAGS, or the folder $folder."
  fi
  sleep 0.5
done
say "vLLM samples from $folder on port $port"
