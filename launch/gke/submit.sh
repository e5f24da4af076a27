#!/usr/bin/env bash
# Sends a run to a Kubernetes cluster with JobSet, GPUs or TPUs:
#   IMAGE=REGISTRY/mgen_jax:TAG NODES=4 CLAIM=films launch/gke/submit.sh gpu NAME --config=... \
#     --workdir=/shared/runs/NAME
#   IMAGE=... NODES=16 ACCELERATOR=tpu-v5p-slice TOPOLOGY=4x4x4 CHIPS=4 CLAIM=films SLICES=2 \
#     launch/gke/submit.sh tpu NAME --config=... --workdir=/shared/runs/NAME
# --dry-run as the first word prints the manifest. CLAIM is a PersistentVolumeClaim that many pods may
# write to; it is mounted at /shared. MAX_RESTARTS (50) restarts of all pods, whatever the reason.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
. "$here/../common.sh"

platform=${1:-}
is_in "$platform" gpu tpu || die "'$platform' is not gpu or tpu: launch/gke/submit.sh gpu NAME --config=..."
NAME=${2:-}
[[ $NAME =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
  die "'$NAME' is no name of a JobSet: small letters, digits and dashes, 40 at most"
shift 2
[ $# -gt 0 ] || die "name an experiment: --config=FILE --workdir=/shared/DIR"
words=(NAME IMAGE NODES CLAIM MAX_RESTARTS)
[ "$platform" = gpu ] || words+=(SLICES ACCELERATOR TOPOLOGY CHIPS)
: "${MAX_RESTARTS:=50}" "${SLICES:=1}"

manifest=$(<"$here/jobset-$platform.yaml")
for word in "${words[@]}"; do
  value=${!word:-}
  [ -n "$value" ] || die "$word is not set: see the first lines of launch/gke/submit.sh"
  [[ $value =~ ^[A-Za-z0-9._:/@-]+$ ]] || die "$word is '$value', which a manifest cannot hold"
  manifest=${manifest//"@$word@"/"$value"}
done
# The arguments, each as a string of YAML in double quotes.
arguments=''
for argument in "$@"; do
  argument=${argument//\\/\\\\}
  argument=${argument//\"/\\\"}
  arguments+="\"$argument\", "
done
manifest=${manifest//"@ARGUMENTS@"/"${arguments%, }"}

if [ -n "$dry_run" ]; then
  printf '%s\n' "$manifest"
else
  printf '%s\n' "$manifest" | kubectl apply -f -
fi
