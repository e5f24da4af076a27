#!/usr/bin/env bash
# A run on all hosts of a Cloud TPU slice (TPU VMs), over gcloud:
#   TPU=my-slice ZONE=us-east5-a launch/tpu_vm.sh setup                 installs this repository there
#   TPU=my-slice ZONE=us-east5-a launch/tpu_vm.sh run --config=experiments/t2v_1b.py --workdir=/shared/runs/t2v_1b
#   TPU=my-slice ZONE=us-east5-a launch/tpu_vm.sh stop                  asks it to save and to stop
# --dry-run as the first word prints the commands. --workdir must be on storage that all hosts share
# (a mounted bucket or NFS). PROJECT is gcloud's own by default.
#
# A host that is restarted for maintenance sends SIGTERM first: the run saves, and launch/run.sh
# starts it again on each host. A slice that is taken away must be made again; then `setup`, `run`.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
. "$here/common.sh"

what=${1:-}
[ $# -eq 0 ] || shift
[ -n "${TPU:-}" ] || die "TPU is not set: TPU=NAME ZONE=ZONE launch/tpu_vm.sh setup|run|stop"
[ -n "${ZONE:-}" ] || die "ZONE is not set: gcloud compute tpus tpu-vm list --zone=- shows it"

gcloud=(gcloud compute tpus tpu-vm)
where=(--zone="$ZONE" --worker=all)
[ -z "${PROJECT:-}" ] || where+=(--project="$PROJECT")

case "$what" in
  setup)
    act "${gcloud[@]}" scp --recurse "$here/.." "$TPU:mgen_jax" "${where[@]}"
    act "${gcloud[@]}" ssh "$TPU" "${where[@]}" --command="cd mgen_jax && python3 -m venv .venv && \
.venv/bin/pip install -q -e '.[tpu]'"
    ;;
  run)
    [ $# -gt 0 ] || die "name an experiment: launch/tpu_vm.sh run --config=FILE --workdir=DIR"
    # In its own session, so that it outlives the connection; its log stays on each host.
    run="cd mgen_jax && PLATFORM=tpu PYTHON=.venv/bin/python3 setsid nohup \
launch/run.sh --cluster=tpu $(quoted "$@")>> run.log 2>&1 < /dev/null & echo \$! > mgen_jax/run.pid"
    act "${gcloud[@]}" ssh "$TPU" "${where[@]}" --command="$run"
    say "watch it: ${gcloud[*]} ssh $TPU --zone=$ZONE --worker=0 --command='tail -f mgen_jax/run.log'"
    ;;
  stop)
    act "${gcloud[@]}" ssh "$TPU" "${where[@]}" --command="kill -TERM \$(cat mgen_jax/run.pid)"
    ;;
  *) die "'$what' is not setup, run or stop" ;;
esac
