#!/usr/bin/env bash
#SBATCH --job-name=mgen_jax
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=TERM@180
# A run on the nodes of a SLURM allocation, one process on each with all of its GPUs:
#   sbatch --nodes=4 --time=24:00:00 launch/slurm.sh --config=experiments/t2v_1b.py --workdir=DIR
#   launch/slurm.sh --dry-run --config=...        prints what it would run
# Submit from the root of the repository; flags of sbatch go before its name, and win over the lines
# above. --workdir must be on a file system that all nodes share.
#
# Preempted, or 180 s before its time is up, SLURM sends SIGTERM to the processes: they save and exit
# with 143, and the job is put back in the queue. A process that dies ends the others, and all start
# again in the same allocation. Every start is a line in the log.
#   CONTAINER=IMAGE   start the processes in a container (pyxis): flags --container-image, -mounts
#   PLATFORM, PYTHON  as in launch/run.sh
set -euo pipefail
root=${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
[ -f "$root/launch/common.sh" ] || {
  echo "slurm.sh: submit from the root of the repository, and not from $root" >&2
  exit 2
}
# shellcheck source=launch/common.sh
. "$root/launch/common.sh"

[ $# -gt 0 ] || die "name an experiment: sbatch launch/slurm.sh --config=FILE --workdir=DIR"
[ -n "${SLURM_JOB_ID:-}${dry_run}" ] || die "there is no allocation: submit with sbatch, or --dry-run"

# Without --kill-on-bad-exit the others would wait for the one that died until JAX misses it.
srun=(srun --kill-on-bad-exit=1 --label)
if [ -n "${CONTAINER:-}" ]; then
  srun+=(--container-image="$CONTAINER" --container-mounts="$root:$root" --container-workdir="$root")
fi
platform=${PLATFORM:-gpu}
is_in "$platform" gpu tpu cpu || die "PLATFORM is $platform: use gpu, tpu or cpu"
# shellcheck source=launch/xla_flags.sh
. "$root/launch/xla_flags.sh" "$platform"
command=("${srun[@]}" "${PYTHON:-python3}" -m mgen_jax.main --cluster=slurm "$@")
if [ -n "$dry_run" ]; then
  echo "XLA_FLAGS=${XLA_FLAGS:-}"
  quoted "${command[@]}"
  exit 0
fi

cd "$root"
say "job $SLURM_JOB_ID on ${SLURM_JOB_NODELIST:-this host}, start $((${SLURM_RESTART_COUNT:-0} + 1))"
code=0
RESTART_CODES='75 134 137' restarting "${command[@]}" || code=$?
if [ "$code" = 143 ]; then # srun gives the highest code: some were asked to stop, and have saved
  say "saved and stopped: back in the queue"
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
