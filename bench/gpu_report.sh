#!/usr/bin/env bash
# Runs everything for one visit to a machine with a GPU, in under nine minutes: build, tests, compute-sanitizer, verify, bench.
#
#   OUT       where results go (default: .build/gpu_report): results.json, report.md, plots.tar.gz, log.txt, summary.txt
#   DEVICE    cuda, or cpu to try the script without a GPU (default: cuda)
#   PYTHON    an interpreter with torch, pytest, pytest-xdist, hypothesis, matplotlib, tqdm (default: python3)
#   SECONDS_IN_ALL   (default: 530)
#   FASTBN_REVISION  the git revision, for records of a tree that came without its history
#
# Needs no network. A step that fails or runs out of time does not stop the others. The summary is printed last.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=$(mkdir -p "${OUT:-.build/gpu_report}" && cd "${OUT:-.build/gpu_report}" && pwd)
DEVICE=${DEVICE:-cuda}
PYTHON=${PYTHON:-python3}
SECONDS_IN_ALL=${SECONDS_IN_ALL:-530}
LOGS=$(mktemp -d)
export PYTHONUNBUFFERED=1 MAX_JOBS=${MAX_JOBS:-$(nproc)}
trap 'rm -rf "$LOGS"' EXIT
: > "$LOGS/status"

# step NAME LIMIT COMMAND...: runs COMMAND for LIMIT seconds at most, and within the total; it has a log of its own.
step() {
  local name=$1 limit=$2 left=$((SECONDS_IN_ALL - SECONDS)) begun=$SECONDS status outcome
  shift 2
  [ "$left" -lt "$limit" ] && limit=$left
  if [ "$limit" -lt 5 ]; then
    echo "$name|left out: no time|0" >> "$LOGS/status"
    return
  fi
  printf '== %s (at most %s s)\n' "$name" "$limit"
  # Background commands of a shell ignore INT; bench takes TERM as an interrupt.
  LIMIT=$limit timeout --signal=TERM --kill-after=10 "$limit" "$@" > "$LOGS/$name" 2>&1
  status=$?
  case $status in
    0) outcome=ok ;;
    124 | 137) outcome="out of time" ;;
    *) outcome="FAILED ($status)" ;;
  esac
  echo "$name|$outcome|$((SECONDS - begun))" >> "$LOGS/status"
}

machine() {
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  nvcc --version | tail -2
  git rev-parse HEAD 2> /dev/null || echo "revision ${FASTBN_REVISION:-unknown: set FASTBN_REVISION}"
  "$PYTHON" -c 'import sys, torch; print("python", sys.version.split()[0], "torch", torch.__version__, torch.version.cuda)'
}

build() {
  # Build for the GPU that is here alone: a third of the time of the default.
  if [ "$DEVICE" = cuda ] && [ -z "${TORCH_CUDA_ARCH_LIST:-}" ]; then
    TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || return
    export TORCH_CUDA_ARCH_LIST
  fi
  "$PYTHON" setup.py -q egg_info && FASTBN_CUDA=1 "$PYTHON" setup.py -q build_ext --inplace && "$PYTHON" -m fastbn info
}

tests() {
  [ "$DEVICE" = cuda ] && export FASTBN_REQUIRE_CUDA=1
  export OMP_NUM_THREADS=2
  exec "$PYTHON" -m pytest -q -m gpu -n "$(($(nproc) / 2))"
}

# sanitize TOOL: runs the small cases of every op and both kinds of layout.
sanitize() {
  OMP_NUM_THREADS=2 compute-sanitizer --tool "$1" --error-exitcode 9 "$PYTHON" -m pytest -q -p no:cacheprovider \
    tests/ops/test_ops.py -m gpu -k "prime or rgb or aligned"
}

sanitizers() {
  local tool status=0 pids=()
  for tool in memcheck racecheck synccheck; do
    sanitize "$tool" > "$LOGS/sanitizer.$tool" 2>&1 &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
  for tool in memcheck racecheck synccheck; do
    echo "-- $tool"
    tail -n 40 "$LOGS/sanitizer.$tool"
  done
  return "$status"
}

verify() { exec "$PYTHON" -m fastbn verify --device "$DEVICE"; }

bench() {
  local suite=gpu
  [ "$DEVICE" = cuda ] || suite=quick
  # The rest of the time is for the plots, and for the last case, which may exceed the limit.
  # exec replaces this shell: the signal of `timeout` must reach bench, and bench must be waited for.
  exec "$PYTHON" -m bench --suite "$suite" --device "$DEVICE" --time-limit "$((LIMIT - 40))" \
    --json "$OUT/results.json" --plots "$LOGS/plots"
}

export -f machine build tests sanitize sanitizers verify bench
export OUT DEVICE PYTHON SECONDS_IN_ALL LOGS

step machine 15 bash -c machine
step build 170 bash -c build
step tests 130 bash -c tests
step sanitizers 90 bash -c sanitizers
step verify 25 bash -c verify
step bench "$SECONDS_IN_ALL" bash -c bench

[ -f "$LOGS/plots/report.md" ] && cp "$LOGS/plots/report.md" "$OUT/"
[ -d "$LOGS/plots" ] && tar -czf "$OUT/plots.tar.gz" -C "$LOGS" plots
for log in "$LOGS"/{machine,build,tests,sanitizers,verify,bench}; do
  [ -f "$log" ] && printf '\n==== %s\n' "${log##*/}" && tr '\r' '\n' < "$log"
done > "$OUT/log.txt"

last() { [ -f "$LOGS/$1" ] && tr '\r' '\n' < "$LOGS/$1" | grep -v '^ *$' | tail -n "$2" | cut -c1-200; }
{
  printf '\n==== summary\n'
  last machine 5
  while IFS='|' read -r name outcome seconds; do printf '%-11s %-18s %4s s\n' "$name" "$outcome" "$seconds"; done < "$LOGS/status"
  for part in "build 3" "tests 8" "sanitizers 12" "verify 3" "bench 42"; do
    set -- $part
    printf -- '-- %s\n' "$1"
    last "$1" "$2"
  done
} | head -n 99 | tee "$OUT/summary.txt"
! grep -qv '|ok|' "$LOGS/status"
