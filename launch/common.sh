# shellcheck shell=bash
# What the launchers share: words to the user, dry runs, and restarts. To be sourced by bash, before a
# launcher reads its own words: --dry-run as the first of them is taken away, and noted in `dry_run`;
# --help prints the launcher's first lines.

if [ "${1:-}" = --help ]; then
  awk 'NR > 1 && !/^#/ { exit } /^# / || /^#$/ { sub(/^# ?/, ""); print }' "$0"
  echo "Flags of the run: python -m mgen_jax.main --help"
  exit 0
fi
dry_run=''
if [ "${1:-}" = --dry-run ]; then
  dry_run=yes
  shift
fi

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

die() {
  say "$*"
  exit 2
}

# quoted CMD ARGS...: the command as one could type it.
quoted() {
  printf '%q ' "$@"
  echo
}

# act CMD ARGS...: runs it, or in a dry run prints it.
act() {
  if [ -n "$dry_run" ]; then
    quoted "$@"
  else
    "$@"
  fi
}

# Exit codes of `python -m mgen_jax.main` (see mgen_jax/cli.py) after which the same command goes on:
#   143  SIGTERM: it has saved and stopped, as asked by a scheduler
#    75  it waited too long for another process (mgen_jax/distributed.py)
#   134  it was aborted: JAX does so when another process is lost
#   137  SIGKILL: the memory of the host was full, or its time was up
# Not among them: 0 (done), 2 (a fault that the user can fix), 130 (Ctrl-C), 1 (a bug).
RESTART_CODES=${RESTART_CODES-143 75 134 137}

# is_in CODE CODES...
is_in() {
  local code=$1 other
  shift
  for other in "$@"; do
    [ "$code" = "$other" ] && return 0
  done
  return 1
}

# restarting CMD ARGS...: runs it, again after each code of RESTART_CODES. SIGTERM is handed on, and
# then nothing is started again. Gives up after three runs in a row that were shorter than
# QUICK_SECONDS: what fails that soon would fail again. Returns the code of the last run.
restarting() {
  local quick=0 restarts=0 code began
  child='' stopping=''
  trap 'stopping=yes; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || :' TERM INT
  while :; do
    began=$SECONDS
    "$@" &
    child=$!
    code=0
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do # a signal ended the wait, and not the run
      code=0
      wait "$child" || code=$?
    done
    # shellcheck disable=SC2086  # a list of words
    if [ -n "$stopping" ] || ! is_in "$code" $RESTART_CODES; then
      return "$code"
    fi
    if [ $((SECONDS - began)) -lt "${QUICK_SECONDS:-120}" ]; then
      quick=$((quick + 1))
    else
      quick=0
    fi
    if [ "$quick" -ge 3 ]; then
      say "exit code $code, the third within ${QUICK_SECONDS:-120} s of its start: giving up"
      return "$code"
    fi
    restarts=$((restarts + 1))
    say "exit code $code: start number $((restarts + 1)) in ${RESTART_DELAY:-10} s"
    sleep "${RESTART_DELAY:-10}" &
    wait $! || :
    [ -z "$stopping" ] || return 143
  done
}
