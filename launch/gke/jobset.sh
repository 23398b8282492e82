#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster, as the JobSet of launch/gke/jobset.yaml, with kubectl:
#
#   launch/gke/jobset.sh run [--dry-run] -- COMMAND ARGUMENTS...
#   launch/gke/jobset.sh logs | delete [--dry-run]
#
#   export KTO_GKE_NAME=mine KTO_GKE_IMAGE=REGISTRY/kto_jax:tpu KTO_GKE_ACCELERATOR=tpu-v5-lite-podslice \
#     KTO_GKE_TOPOLOGY=4x4 KTO_GKE_HOSTS=4 KTO_GKE_CHIPS=4
#   launch/gke/jobset.sh run -- python -m kto_jax.train --config=configs/kto_llama.py --workdir=gs://my-bucket/mine
#
# The cluster restarts the run after exit code 75, after 134 (JAX lost another process) or after the loss of a node, and
# after nothing else. --dry-run prints the YAML.
#
# KTO_GKE_NAME        name of the JobSet              KTO_GKE_IMAGE      built from launch/Dockerfile.tpu
# KTO_GKE_ACCELERATOR the node label                  KTO_GKE_TOPOLOGY   topology of one slice, such as 4x4
# KTO_GKE_HOSTS       nodes of one slice              KTO_GKE_CHIPS      chips of one node
# KTO_GKE_CLAIM       a volume claim that all pods can write to, mounted at /runs; not needed for a run in a bucket
# KTO_GKE_SLICES      slices (1)                      KTO_GKE_SPOT       1: spot nodes (default), 0: any
# KTO_GKE_SECRET      a Kubernetes secret whose entries become environment variables, if it exists (kto-jax-secrets)
# KTO_MAX_RESTARTS    restarts over the JobSet's life (20)

set -euo pipefail
GKE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=../common.sh
source "$GKE/../common.sh"

# quoted TEXT: prints the text as a JSON string, which is also YAML.
quoted() {
  local text=${1//\\/\\\\}
  printf '"%s"' "${text//\"/\\\"}"
}

# render: prints the JobSet. The shell inserts values and never runs them.
render() {
  local line name word command=
  declare -A values=(
    [NAME]=$(quoted "$KTO_GKE_NAME") [IMAGE]=$(quoted "$KTO_GKE_IMAGE") [ACCELERATOR]=$(quoted "$KTO_GKE_ACCELERATOR")
    [TOPOLOGY]=$(quoted "$KTO_GKE_TOPOLOGY") [CLAIM]=$(quoted "${KTO_GKE_CLAIM:-}") [SECRET]=$(quoted "$KTO_GKE_SECRET")
    [HOSTS]=$KTO_GKE_HOSTS [CHIPS]=$KTO_GKE_CHIPS [SLICES]=$KTO_GKE_SLICES [MAX_RESTARTS]=$KTO_MAX_RESTARTS
  )
  for word in "${COMMAND[@]}"; do command+=${command:+, }$(quoted "$word"); done
  values[COMMAND]="[$command]"
  while IFS= read -r line; do
    if ((KTO_GKE_SPOT == 0)) && [[ $line == *"# spot only" ]]; then continue; fi
    if [[ -z ${KTO_GKE_CLAIM:-} && $line == *@("# claim only"|"\${CLAIM}") ]]; then continue; fi
    if [[ $line =~ ^([^#]*)\$\{([A-Z_]+)\}$ ]]; then
      name=${BASH_REMATCH[2]}
      line=${BASH_REMATCH[1]}${values[$name]}
    fi
    printf '%s\n' "$line"
  done <"$GKE/jobset.yaml"
}

run_command() {
  local name word yaml
  need KTO_GKE_IMAGE REGISTRY/kto_jax:tpu
  need KTO_GKE_ACCELERATOR tpu-v5-lite-podslice
  need KTO_GKE_TOPOLOGY 4x4
  need KTO_GKE_HOSTS 4
  need KTO_GKE_CHIPS 4
  if [[ -z ${KTO_GKE_CLAIM:-} && "${COMMAND[*]}" != *"--workdir=gs://"* ]]; then
    fail "Neither KTO_GKE_CLAIM nor a --workdir in a bucket is set." "Allowed: either; the pods share no disk." \
      "Add --workdir=gs://BUCKET/RUN to the command, or set it: export KTO_GKE_CLAIM=runs"
  fi
  KTO_GKE_SLICES=${KTO_GKE_SLICES:-1} KTO_GKE_SPOT=${KTO_GKE_SPOT:-1} KTO_MAX_RESTARTS=${KTO_MAX_RESTARTS:-20}
  KTO_GKE_SECRET=${KTO_GKE_SECRET:-kto-jax-secrets}
  for name in KTO_GKE_HOSTS KTO_GKE_CHIPS KTO_GKE_SLICES; do need_number "$name" 1; done
  need_number KTO_MAX_RESTARTS 0
  need_switch KTO_GKE_SPOT
  need_command "$0 run"
  for word in "$KTO_GKE_NAME" "$KTO_GKE_IMAGE" "$KTO_GKE_ACCELERATOR" "$KTO_GKE_TOPOLOGY" "${KTO_GKE_CLAIM:-}" \
    "$KTO_GKE_SECRET" "${COMMAND[@]}"; do
    [[ $word != *[[:cntrl:]]* ]] || fail "A setting or argument holds a control character." "Allowed: printable text." \
      "Remove line breaks and tabs."
  done
  yaml=$(render)
  if ((DRY_RUN)); then
    printf '%s\n' "$yaml"
  else
    kubectl create --filename=- <<<"$yaml"
  fi
}

parse "$@"
((${#WORDS[@]} == 1)) || fail "${#WORDS[@]} commands stand before --." "Allowed: one of run, logs, delete." \
  "See $0 --help."
need KTO_GKE_NAME mine
need_program kubectl "https://cloud.google.com/kubernetes-engine/docs/how-to/cluster-access-for-kubectl"
case ${WORDS[0]} in
  run) run_command ;;
  logs)
    # The first pod of the first slice is process 0, which writes the log.
    labels=jobset.sigs.k8s.io/jobset-name=$KTO_GKE_NAME,jobset.sigs.k8s.io/job-index=0
    labels+=,batch.kubernetes.io/job-completion-index=0
    run kubectl logs --follow --tail=-1 --container=train "--selector=$labels"
    ;;
  delete) run kubectl delete jobset "$KTO_GKE_NAME" ;;
  *) fail "'${WORDS[0]}' was given." "Allowed: run, logs, delete." "See $0 --help." ;;
esac
