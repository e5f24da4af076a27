#!/usr/bin/env bash
# Runs an experiment on this host, and starts it again where it was preempted or lost a partner:
#   launch/run.sh [--dry-run] --config=experiments/t2v_1b.py --workdir=/shared/runs/t2v_1b ...
# All flags but --dry-run (print, run nothing) are those of `python -m mgen_jax.main`. It is what the
# container starts, and what the other launchers start on each host.
#   PLATFORM=gpu|tpu|cpu   which settings of launch/xla_flags.sh; gpu by default
#   PYTHON                 the interpreter; python3 by default
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
. "$here/common.sh"

[ $# -gt 0 ] || die "name an experiment: launch/run.sh --config=experiments/quickstart.py --workdir=DIR"
platform=${PLATFORM:-gpu}
is_in "$platform" gpu tpu cpu || die "PLATFORM is $platform: use gpu, tpu or cpu"
# shellcheck source=launch/xla_flags.sh
. "$here/xla_flags.sh" "$platform"
command=("${PYTHON:-python3}" -m mgen_jax.main "$@")
if [ -n "$dry_run" ]; then
  echo "XLA_FLAGS=${XLA_FLAGS:-}"
  echo "LIBTPU_INIT_ARGS=${LIBTPU_INIT_ARGS:-}"
  quoted "${command[@]}"
  exit 0
fi
code=0
restarting "${command[@]}" || code=$?
exit "$code"
