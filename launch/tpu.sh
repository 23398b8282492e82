#!/usr/bin/env bash
# Trains on Cloud TPU through a queued resource, from this machine, with gcloud:
#
#   launch/tpu.sh run [--dry-run] -- COMMAND ARGUMENTS...
#   launch/tpu.sh logs | delete [--dry-run]
#
#   export KTO_TPU_NAME=mine KTO_TPU_ZONE=us-west4-a KTO_TPU_TYPE=v5litepod-16 KTO_TPU_RUNTIME=v2-alpha-tpuv5-lite
#   launch/tpu.sh run -- python -m kto_jax.train --config=configs/kto_llama.py --workdir=gs://my-bucket/mine
#
# run requests the TPU if there is none, waits until it is ACTIVE, copies the project at KTO_REVISION to all workers,
# installs it, starts the command on all of them and follows worker 0. If the run is preempted (exit code 75 or 134, or the TPU
# is gone), it is restarted, on a new TPU if necessary; no other exit code restarts it. The command does not depend on
# this connection: after a Ctrl-C here it continues, and the same run command follows it again.
#
# KTO_TPU_NAME        name of the queued resource     KTO_TPU_ZONE       such as us-west4-a
# KTO_TPU_TYPE        such as v5litepod-16            KTO_TPU_RUNTIME    such as v2-alpha-tpuv5-lite
# KTO_TPU_SLICES      slices of that type (1)         KTO_TPU_SPOT       1: spot (default), 0: on demand
# KTO_TPU_PROJECT     instead of gcloud's default     KTO_TPU_WAIT       give up the request after this long, such as 6h
# KTO_TPU_SETUP       a shell command that each worker runs before the first start, such as one that mounts a share
# KTO_TPU_DELETE      1: delete the TPU when the run has ended (0)
# KTO_REVISION        the git revision to train with (HEAD)
# KTO_SECRETS         names of variables to pass on (HF_TOKEN WANDB_API_KEY), in a file that only you can read
# KTO_POLL_SECONDS    seconds between polls of the TPU (30)
# KTO_MAX_RESTARTS    restarts in a row (20)          KTO_PAUSE_SECONDS  pause before each (60)
# KTO_RESET_SECONDS   a run that lasted this long (1800) resets the count

set -euo pipefail
LAUNCH=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$LAUNCH/common.sh"

read_settings() {
  need KTO_TPU_NAME mine
  need KTO_TPU_ZONE us-west4-a
  [[ $KTO_TPU_NAME =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || fail "KTO_TPU_NAME is '$KTO_TPU_NAME'." \
    "Allowed: lower-case letters, digits and hyphens, a letter first, at most 40." "Choose such a name."
  KTO_POLL_SECONDS=${KTO_POLL_SECONDS:-30} KTO_TPU_SLICES=${KTO_TPU_SLICES:-1} KTO_TPU_SPOT=${KTO_TPU_SPOT:-1}
  need_number KTO_POLL_SECONDS 0
  need_number KTO_TPU_SLICES 1
  KTO_TPU_DELETE=${KTO_TPU_DELETE:-0}
  need_switch KTO_TPU_SPOT
  need_switch KTO_TPU_DELETE
  where=("--zone=$KTO_TPU_ZONE" --quiet)
  if [[ -n ${KTO_TPU_PROJECT:-} ]]; then where+=("--project=$KTO_TPU_PROJECT"); fi
  need_program gcloud "https://cloud.google.com/sdk/docs/install"
}

queued_resource() { run gcloud compute tpus queued-resources "$1" "$KTO_TPU_NAME" "${@:2}" "${where[@]}"; }
on_workers() { queued_resource ssh --node=all --worker=all "--command=bash .kto_jax/tpu_worker.sh $1"; }
# ServerAlive: a TPU that is taken away does not close its connections.
follow() {
  queued_resource ssh --node=0 --worker=0 --ssh-flag=-oServerAliveInterval=30 \
    "--command=bash .kto_jax/tpu_worker.sh follow"
}
delete() { queued_resource delete --force; }

create() {
  local flags=("--accelerator-type=$KTO_TPU_TYPE" "--runtime-version=$KTO_TPU_RUNTIME")
  if ((KTO_TPU_SLICES == 1)); then
    flags+=("--node-id=$KTO_TPU_NAME")
  else
    flags+=("--node-count=$KTO_TPU_SLICES" "--node-prefix=$KTO_TPU_NAME")
  fi
  if ((KTO_TPU_SPOT)); then flags+=(--spot); fi
  if [[ -n ${KTO_TPU_WAIT:-} ]]; then flags+=("--valid-until-duration=$KTO_TPU_WAIT"); fi
  queued_resource create "${flags[@]}"
}

# read_state: prints the state of the queued resource, ABSENT if there is none.
read_state() {
  local tries state
  for tries in 1 2 3 4 5; do
    if state=$(queued_resource describe "--format=value(state.state)" 2>"$scratch/error"); then
      printf '%s\n' "${state:-UNKNOWN}"
      return
    fi
    if grep -q NOT_FOUND "$scratch/error"; then
      printf 'ABSENT\n'
      return
    fi
    say "gcloud does not say how the TPU is (try $tries of 5)"
    sleep "$KTO_POLL_SECONDS"
  done
  cat "$scratch/error" >&2
  return 1
}

# ensure_active: waits for an ACTIVE queued resource; returns 75 after deleting one that never will be.
ensure_active() {
  local state
  if ((DRY_RUN)); then
    create
    queued_resource describe "--format=value(state.state)"
    return
  fi
  while true; do
    state=$(read_state) || return 1
    say "queued resource $KTO_TPU_NAME: $state"
    case $state in
      ACTIVE) return 0 ;;
      ABSENT) create || return 1 ;;
      SUSPENDED | FAILED)
        delete || return 1
        return "$PREEMPTED"
        ;;
    esac
    sleep "$KTO_POLL_SECONDS"
  done
}

# taken_away: whether the TPU was preempted. A queued resource may stay ACTIVE for a while after its nodes are gone.
taken_away() {
  local state node nodes=("$KTO_TPU_NAME")
  state=$(read_state) || return 1
  if [[ $state == ABSENT || $state == DELETING ]]; then
    say "the queued resource was deleted by somebody else"
    exit 1
  fi
  [[ $state == ACTIVE ]] || return 0
  if ((KTO_TPU_SLICES > 1)); then mapfile -t nodes < <(seq -f "$KTO_TPU_NAME-%.0f" 0 $((KTO_TPU_SLICES - 1))); fi
  for node in "${nodes[@]}"; do
    state=$(gcloud compute tpus tpu-vm describe "$node" "--format=value(state)" "${where[@]}" 2>/dev/null) || continue
    if [[ $state == PREEMPTED || $state == TERMINATED ]]; then return 0; fi
  done
  return 1
}

# write_bundle: writes to $bundle what every worker gets.
write_bundle() {
  local - name names
  # As in secret_names: not even bash -x prints a secret.
  set +x
  mkdir -m 700 "$bundle"
  git -C "$LAUNCH/.." archive --format=tar.gz "--output=$bundle/source.tar.gz" "$KTO_REVISION"
  cp "$LAUNCH/tpu_worker.sh" "$bundle/"
  printf '%q ' "${COMMAND[@]}" >"$bundle/command.sh"
  printf '%s\n' "${KTO_TPU_SETUP:-}" >"$bundle/setup.sh"
  (umask 077 && : >"$bundle/secrets.env")
  names=$(secret_names)
  for name in $names; do printf '%s=%q\n' "$name" "${!name}" >>"$bundle/secrets.env"; done
}

start() {
  run gcloud compute tpus queued-resources scp --recurse "$bundle" "$KTO_TPU_NAME:" --node=all --worker=all \
    "${where[@]}" &&
    on_workers install && on_workers start
}

# exit_code: reads the workers' states and prints the exit code of the whole run. A lost worker's machine restarted.
exit_code() {
  local what code worst=0
  while read -r _ what code; do
    if [[ $what == lost ]]; then code=$PREEMPTED; elif [[ $what == new ]]; then code=1; fi
    if ((code != 0 && worst == 0)) || { ((code != 0)) && ! may_restart "$code"; }; then worst=$code; fi
  done
  printf '%s\n' "$worst"
}

# watch: follows the run until it has ended on all workers; returns its exit code, or 75 if the TPU is gone.
watch() {
  local states code
  while true; do
    follow || true
    if ((DRY_RUN)); then
      on_workers state
      return
    fi
    if taken_away; then return "$PREEMPTED"; fi
    if states=$(on_workers state | grep '^kto_jax-state: ') && ! grep -q running <<<"$states"; then
      code=$(exit_code <<<"$states")
      if ((code == 0)) || may_restart "$code"; then return "$code"; fi
      # A worker may have failed because another was taken away, which becomes visible a little later.
      sleep "$KTO_POLL_SECONDS"
      if taken_away; then return "$PREEMPTED"; fi
      return "$code"
    fi
    sleep "$KTO_POLL_SECONDS"
  done
}

attempt() {
  ensure_active || return
  if ! ((DRY_RUN)) && on_workers state 2>/dev/null | grep -q '^kto_jax-state: running'; then
    say "a run is already under way there; following it"
  elif ! start; then
    if ! ((DRY_RUN)) && taken_away; then return "$PREEMPTED"; fi
    say "the workers could not be set up; see above"
    return 1
  fi
  local code=0
  watch || code=$?
  # A preempted resource still occupies its name.
  if ((code == PREEMPTED)) && taken_away; then delete || return 1; fi
  return "$code"
}

run_command() {
  local code=0
  need KTO_TPU_TYPE v5litepod-16
  need KTO_TPU_RUNTIME v2-alpha-tpuv5-lite
  need_command "$0 run"
  read_restart_settings 60
  KTO_REVISION=${KTO_REVISION:-HEAD}
  git -C "$LAUNCH/.." rev-parse --quiet --verify "$KTO_REVISION^{commit}" >/dev/null ||
    fail "KTO_REVISION is '$KTO_REVISION'." "Allowed: a commit, branch or tag of this repository." \
      "Fetch it, or correct it."
  if [[ -z ${KTO_TPU_SETUP:-} && "${COMMAND[*]}" != *"--workdir=gs://"* ]]; then
    say "warning: the workers share no disk, and a spot TPU loses its disks when preempted. Keep the run in a bucket" \
      "(--workdir=gs://BUCKET/RUN), or set KTO_TPU_SETUP to mount a shared folder for --workdir."
  fi
  if ! ((DRY_RUN)); then write_bundle; fi
  restart_while_preempted attempt || code=$?
  if ((KTO_TPU_DELETE)); then
    delete || say "the TPU could not be deleted and is still billed; see above"
  elif ! ((DRY_RUN)); then
    say "the TPU is kept, and billed, until: $0 delete"
  fi
  return "$code"
}

parse "$@"
((${#WORDS[@]} == 1)) || fail "${#WORDS[@]} commands stand before --." "Allowed: one of run, logs, delete." \
  "See $0 --help."
scratch=$(mktemp -d)
bundle=$scratch/.kto_jax
trap 'rm -rf "$scratch"' EXIT
case ${WORDS[0]} in
  run)
    read_settings
    run_command
    ;;
  logs)
    read_settings
    follow
    ;;
  delete)
    read_settings
    delete
    ;;
  *) fail "'${WORDS[0]}' was given." "Allowed: run, logs, delete." "See $0 --help." ;;
esac
