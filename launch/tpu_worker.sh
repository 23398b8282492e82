#!/usr/bin/env bash
# One TPU worker's part of launch/tpu.sh, which copies this to ~/.kto_jax and calls it there:
#
#   tpu_worker.sh install | start | follow | state
#
# state prints one line: "kto_jax-state: " and new, running, ended CODE, or lost (the machine restarted during the run).

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

running() { [[ -s pid ]] && grep -q tpu_worker.sh "/proc/$(<pid)/cmdline" 2>/dev/null; }

install() {
  # The system's Python may be older than 3.11, so uv installs one.
  rm -rf source && mkdir source && tar -xzf source.tar.gz -C source
  python3 -m pip install --user --quiet uv==0.13.8
  [[ -x venv/bin/python ]] || python3 -m uv venv --quiet --python=3.11 venv
  local jax gcsfs
  jax=$(sed -n 's/^jax==//p' source/requirements.txt)
  gcsfs=$(grep -o 'gcsfs==[0-9.]*[0-9]' source/requirements.txt)
  python3 -m uv pip install --quiet --python=venv/bin/python -r source/requirements.txt "jax[tpu]==$jax" "$gcsfs"
  bash setup.sh
}

start() {
  if running; then return; fi
  rm -f ended
  [[ ! -e log ]] || mv log log.previous
  # In its own session it outlives this connection.
  nohup setsid bash "$PWD/tpu_worker.sh" train </dev/null >log 2>&1 &
  printf '%s\n' "$!" >pid
}

train() {
  local code=0 home=$PWD
  # At shutdown every process gets SIGTERM; this one must stay alive to record the run's exit code.
  trap : TERM
  set -a
  # shellcheck source=/dev/null
  source secrets.env
  set +a
  PATH=$home/venv/bin:$PATH
  cd source
  bash "$home/command.sh" || code=$?
  printf '%s\n' "$code" >"$home/ended.partial"
  mv "$home/ended.partial" "$home/ended"
}

state() {
  if [[ -e ended ]]; then
    printf 'kto_jax-state: ended %s\n' "$(<ended)"
  elif running; then
    printf 'kto_jax-state: running\n'
  elif [[ -e pid ]]; then
    printf 'kto_jax-state: lost\n'
  else
    printf 'kto_jax-state: new\n'
  fi
}

case ${1:-} in
  install | start | train | state) "$1" ;;
  follow) tail --lines=+1 --sleep-interval=0.2 --follow=name "--pid=$(<pid)" log ;;
  *)
    printf 'error: %s %s %s\n' "'${1:-}' was given." "Allowed: install, start, follow, state." \
      "Start launch/tpu.sh instead." >&2
    exit 2
    ;;
esac
