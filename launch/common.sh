# shellcheck shell=bash
# Sourced by the scripts in this folder: arguments, errors in three parts, dry runs, signals, restarts.

# Exit codes of kto_jax.train: 0 finished, 75 preempted and 134 aborted by JAX because another process was lost (run the
# same command again). Any other code (1 failed, 2 unusable, 130 interrupted) ends the launch with that code.
readonly PREEMPTED=75 LOST_ANOTHER=134 UNUSABLE=2

# may_restart CODE: whether the same command should be run again.
may_restart() { (($1 == PREEMPTED || $1 == LOST_ANOTHER)); }

say() { printf 'kto_jax: %s\n' "$*" >&2; }

# fail GIVEN ALLOWED REMEDY: prints what was given, what is allowed and what to do, and exits.
fail() {
  printf 'error: %s %s %s\n' "$1" "$2" "$3" >&2
  exit "$UNUSABLE"
}

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 501)); then
  fail "This is bash $BASH_VERSION." "Allowed: 5.1 or newer." "Install a newer bash and call it by name."
fi

# usage: prints the comment at the top of the script.
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; }

# parse ARGS...: sets DRY_RUN, WORDS (the arguments before --) and COMMAND (those after it).
parse() {
  DRY_RUN=0 WORDS=() COMMAND=()
  while (($#)); do
    case $1 in
      --help | -h)
        usage
        exit 0
        ;;
      --dry-run) DRY_RUN=1 ;;
      --)
        shift
        COMMAND=("$@")
        return
        ;;
      *) WORDS+=("$1") ;;
    esac
    shift
  done
}

need_command() {
  ((${#COMMAND[@]})) || fail "No command was given." "Allowed: $1 -- COMMAND ARGUMENTS..." \
    "Add the training command after --, such as python -m kto_jax.train --config=configs/quickstart.py."
}

no_words() {
  ((${#WORDS[@]} == 0)) || fail "'${WORDS[0]}' was given." "Allowed: $1" "See $0 --help."
}

# need NAME EXAMPLE: the setting NAME must not be empty.
need() {
  [[ -n ${!1:-} ]] || fail "$1 is not set." "Allowed: a value such as $2." "Set it: export $1=$2"
}

# need_number NAME LEAST: the setting NAME must be an integer of at least LEAST.
need_number() {
  if [[ ! ${!1} =~ ^[0-9]{1,9}$ ]] || ((10#${!1} < $2)); then
    fail "$1 is '${!1}'." "Allowed: a whole number of at least $2." "Correct it, for example to $2."
  fi
}

need_switch() {
  [[ ${!1} == [01] ]] || fail "$1 is '${!1}'." "Allowed: 0 and 1." "Choose one."
}

need_program() {
  ((DRY_RUN)) || command -v "$1" >/dev/null ||
    fail "There is no program '$1' on the PATH." "Allowed: one that has the commands that --dry-run prints." \
      "Install it: $2"
}

# run ARGS...: runs a command; a dry run prints it instead.
run() {
  if ((DRY_RUN)); then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

# secret_names: prints the names in KTO_SECRETS that are set. Values are read only where they are passed on.
secret_names() {
  local - name
  # So that bash -x does not print a secret.
  set +x
  for name in ${KTO_SECRETS-HF_TOKEN WANDB_API_KEY}; do
    [[ $name =~ ^[A-Za-z_][A-Za-z_0-9]*$ ]] || fail "KTO_SECRETS has something that is no name (not shown)." \
      "Allowed: names of environment variables, such as HF_TOKEN." "Export the value and list only its name."
    [[ -z ${!name:-} ]] || printf '%s\n' "$name"
  done
}

STOPPED=0
# run_and_forward ARGS...: runs a command in its own process group, forwards every SIGTERM and Ctrl-C to it, and returns
# its exit code. Sets STOPPED to 1 if there was a signal.
run_and_forward() {
  local child='' code early=''
  # Set before the child starts: no signal may end this script and leave the child running.
  trap 'STOPPED=1; if [[ $child ]]; then kill -TERM -- "-$child" 2>/dev/null || true; else early=TERM; fi' TERM
  trap 'STOPPED=1; if [[ $child ]]; then kill -INT -- "-$child" 2>/dev/null || true; else early=INT; fi' INT
  # Job control gives the child its own group. A plain background command would ignore Ctrl-C.
  set -m
  "$@" </dev/null &
  child=$!
  set +m
  # For signals that arrived before the child had a process id.
  [[ -z $early ]] || kill -s "$early" -- "-$child" 2>/dev/null || true
  while true; do
    code=0
    wait "$child" || code=$?
    # A signal interrupts wait; wait for the child again.
    kill -0 "$child" 2>/dev/null || break
  done
  trap - TERM INT
  # If a signal and the child's exit coincide, wait returns the signal's code; ask for the child's again.
  wait "$child" 2>/dev/null && return 0 || child=$?
  if ((child != 127)); then code=$child; fi
  return "$code"
}

# read_restart_settings PAUSE: reads how often and how soon a preempted run is restarted.
read_restart_settings() {
  KTO_MAX_RESTARTS=${KTO_MAX_RESTARTS:-20} KTO_PAUSE_SECONDS=${KTO_PAUSE_SECONDS:-$1}
  KTO_RESET_SECONDS=${KTO_RESET_SECONDS:-1800}
  need_number KTO_MAX_RESTARTS 0
  need_number KTO_PAUSE_SECONDS 0
  need_number KTO_RESET_SECONDS 1
}

# restart_while_preempted ARGS...: reruns a command while it exits with 75 or 134, after KTO_PAUSE_SECONDS, at most
# KTO_MAX_RESTARTS times in a row. A run of KTO_RESET_SECONDS resets the count. Returns the last exit code.
restart_while_preempted() {
  local code started row=0
  while true; do
    started=$SECONDS code=0
    "$@" || code=$?
    if ! may_restart "$code" || ((STOPPED || DRY_RUN)); then return "$code"; fi
    if ((SECONDS - started >= KTO_RESET_SECONDS)); then row=0; fi
    if ((row >= KTO_MAX_RESTARTS)); then
      say "preempted again after $row restarts in a row; KTO_MAX_RESTARTS allows no more"
      return "$code"
    fi
    row=$((row + 1))
    say "preempted; restart $row of at most $KTO_MAX_RESTARTS in $KTO_PAUSE_SECONDS s"
    sleep "$KTO_PAUSE_SECONDS"
  done
}
