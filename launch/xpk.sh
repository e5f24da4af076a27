#!/usr/bin/env bash
# A run on a GKE cluster that xpk made (https://github.com/AI-Hypercomputer/xpk, its own install):
#   CLUSTER=c ZONE=z PROJECT=p TPU_TYPE=v5p-512 IMAGE=REGISTRY/mgen_jax:TAG \
#     launch/xpk.sh NAME --config=experiments/t2v_1b.py --workdir=DIR
# --dry-run as the first word prints the command. IMAGE is built from the Dockerfile (launch/README.md);
# --workdir must be on storage that all hosts share. SLICES (1), PRIORITY (medium), MAX_RESTARTS (50).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
. "$here/common.sh"

for name in CLUSTER ZONE PROJECT TPU_TYPE IMAGE; do
  [ -n "${!name:-}" ] || die "$name is not set: see the first lines of launch/xpk.sh"
done
name=${1:-}
case "$name" in
  '' | -*) die "name the workload: launch/xpk.sh NAME --config=FILE --workdir=DIR" ;;
esac
shift
[ $# -gt 0 ] || die "name an experiment: launch/xpk.sh NAME --config=FILE --workdir=DIR"

# A pod whose process was stopped (143), or missed another (75, 134, 137), fails; xpk's JobSet then
# starts all of them again. launch/run.sh in the pod is told to leave that to the JobSet.
command=(
  xpk workload create --workload="$name"
  --cluster="$CLUSTER" --zone="$ZONE" --project="$PROJECT"
  --tpu-type="$TPU_TYPE" --num-slices="${SLICES:-1}"
  --docker-image="$IMAGE" --priority="${PRIORITY:-medium}" --max-restarts="${MAX_RESTARTS:-50}"
  --command="cd /mgen_jax && PLATFORM=tpu RESTART_CODES= launch/run.sh --cluster=tpu $(quoted "$@")"
)
act "${command[@]}"
