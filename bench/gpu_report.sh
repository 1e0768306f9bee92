#!/usr/bin/env bash
# Runs everything for one visit to a machine with a GPU of sm_80 or later, in at most eight minutes. What decides comes
# first. A step that fails or runs out of time stops no other, and what it found until then is kept.
#
#   step       at most  what
#   machine       15 s  GPU, driver, versions
#   kernels       40 s  nvcc: bench/plans.cu, for the GPU that is here alone; the extension builds beside it
#   check         40 s  plans --check: every kind of stream plan against two phases and float64; a plan that hangs is named
#   build         60 s  the rest of the extension's build
#   parity        25 s  pytest: the ops that stream plans serve, through torch
#   visit         35 s  visit.cu, where a folder with it was brought along
#   plans         60 s  plans: times of all plans, and a table of the shares of a copy's bandwidth
#   refit         15 s  the constants of bench/model, fitted to some of these times; to all, it needs no GPU
#   tests         45 s  pytest -m gpu
#   memcheck      30 s  compute-sanitizer over small shapes
#   counters      25 s  ncu: those of three stream kernels
#   bench         85 s  the suite visit: fastbn, torch and torch.compile in turns
#   racecheck           compute-sanitizer again, in what is left
#
#   OUT       where results go (default: .build/gpu_report): summary.txt, log.txt, plans.csv, shares.txt, visit.csv,
#             ncu.csv, results.json, report.tar.gz, each as soon as it exists
#   DEVICE    cuda, or cpu to try the script without a GPU (default: cuda)
#   PYTHON    an interpreter with torch, pytest, pytest-xdist, hypothesis, matplotlib, tqdm, scipy (default: python3)
#   PLANS     bench/plans.cu, built already (default: built here, for NVCC_ARCH, by default native)
#   VISIT     a folder with visit.cu, a program that prints a CSV; an ignored one will do (default: .visit)
#   SECONDS_IN_ALL   (default: 480)
#   LIMIT_<step>     seconds for a step, in place of those above
#   FASTBN_REVISION  the git revision, for records of a tree that came without its history
#
# Needs no network. The summary is printed last.
# shellcheck disable=SC2153  # step sets LIMIT
set -uo pipefail
cd "$(dirname "$0")/.." || exit
OUT=$(mkdir -p "${OUT:-.build/gpu_report}" && cd "${OUT:-.build/gpu_report}" && pwd) || exit
DEVICE=${DEVICE:-cuda}
PYTHON=${PYTHON:-python3}
VISIT=${VISIT:-.visit}
SECONDS_IN_ALL=${SECONDS_IN_ALL:-480}
LOGS=$(mktemp -d)
GIVEN_PLANS=${PLANS:-}
PLANS=${PLANS:-$LOGS/plans.program}
export PYTHONUNBUFFERED=1 MAX_JOBS=${MAX_JOBS:-$(nproc)}
EXTENSION=
trap '[ -n "$EXTENSION" ] && kill "$EXTENSION" 2> /dev/null; rm -rf "$LOGS"' EXIT
: > "$LOGS/status"
rm -f "$OUT"/{summary.txt,log.txt,plans.csv,shares.txt,visit.csv,ncu.csv,results.json,report.tar.gz}
readonly LEFT_OUT=77

# leave_out WHY: ends a step that cannot run here.
leave_out() {
  echo "left out: $*"
  exit "$LEFT_OUT"
}

# step NAME LIMIT: runs the function NAME for LIMIT seconds at most, and within the total; it has a log of its own.
step() {
  local name=$1 left=$((SECONDS_IN_ALL - SECONDS)) begun=$SECONDS status outcome
  local own=LIMIT_$name
  local limit=${!own:-$2}
  [ "$left" -lt "$limit" ] && limit=$left
  if [ "$limit" -lt 5 ] && [ -z "${!own:-}" ]; then
    echo "$name|left out: no time|0" >> "$LOGS/status"
    summarise > "$OUT/summary.txt"
    return
  fi
  printf '== %s (at most %s s)\n' "$name" "$limit"
  # bench takes TERM as an interrupt, and writes what it has.
  export LIMIT=$limit
  timeout --signal=TERM --kill-after=5 "$limit" bash -c "$name" > "$LOGS/$name" 2>&1
  status=$?
  case $status in
    0) outcome=ok ;;
    "$LEFT_OUT") outcome=$(tail -n 1 "$LOGS/$name") ;;
    124 | 137) outcome="out of time" ;;
    *) outcome="FAILED ($status)" ;;
  esac
  echo "$name|$outcome|$((SECONDS - begun))" >> "$LOGS/status"
  { printf '\n==== %s\n' "$name" && tail -c 1000000 "$LOGS/$name" | tr '\r' '\n'; } >> "$OUT/log.txt"
  summarise > "$OUT/summary.txt"
}

machine() {
  command -v nvidia-smi > /dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  command -v nvcc > /dev/null && nvcc --version | tail -2
  git rev-parse HEAD 2> /dev/null || echo "revision ${FASTBN_REVISION:-unknown: set FASTBN_REVISION}"
  "$PYTHON" -c 'import sys, torch; print("python", sys.version.split()[0], "torch", torch.__version__, torch.version.cuda)'
}

# Builds the extension for the GPU that is here alone, which takes a third of the time of the default.
extension() {
  if [ "$DEVICE" = cuda ] && [ -z "${TORCH_CUDA_ARCH_LIST:-}" ]; then
    TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || return
    export TORCH_CUDA_ARCH_LIST
  fi
  FASTBN_CUDA=$([ "$DEVICE" = cuda ] && echo 1 || echo 0)
  export FASTBN_CUDA
  "$PYTHON" setup.py -q egg_info && "$PYTHON" setup.py -q build_ext --inplace && "$PYTHON" -m fastbn info
}

# Runs `extension` behind what the steps do, and leaves its exit status in a file.
extension_behind() {
  nice -n 10 bash -c extension > "$LOGS/extension" 2>&1
  echo $? > "$LOGS/extension.part" && mv "$LOGS/extension.part" "$LOGS/extension.status"
}

# compile SOURCE: writes an object of it below $LOGS/objects.
compile() {
  nvcc -std=c++20 -O3 -lineinfo -arch="${NVCC_ARCH:-native}" -Icsrc -c "$1" -o "$LOGS/objects/$(echo "$1" | tr / _).o"
}

# Builds what the step `visit` runs.
visit_program() { nvcc -std=c++20 -O3 -arch="${NVCC_ARCH:-native}" "$VISIT/visit.cu" -o "$LOGS/visit.program"; }

kernels() {
  [ -n "$GIVEN_PLANS" ] && leave_out "PLANS is $PLANS"
  command -v nvcc > /dev/null || leave_out "no nvcc"
  mkdir -p "$LOGS/objects"
  [ -f "$VISIT/visit.cu" ] && visit_program &
  printf '%s\n' bench/plans.cu csrc/cuda/kernels/*.cu csrc/cuda/*.cu |
    xargs -P "$(nproc)" -I{} bash -c 'compile {}' || return
  nvcc -arch="${NVCC_ARCH:-native}" "$LOGS"/objects/*.o -o "$PLANS" || return
  wait  # the step `visit` tells of a failure there
}

# Fails a step that needs bench/plans.cu.
need_plans() { [ -x "$PLANS" ] || leave_out "bench/plans.cu was not built"; }

# size_of_ops SHAPE: prints the arguments that select ops for the device: on the emulator, those of a small shape.
size_of_ops() { [ "$DEVICE" = cuda ] || echo --shape "$1"; }

check() {
  need_plans
  # A hang takes the limit of a plan, and the start of another process.
  # shellcheck disable=SC2046
  exec "$PLANS" --check --every 7 --plan-seconds 3 --seconds "$((LIMIT - 6))" $(size_of_ops 3,8,64)
}

build() {
  until [ -f "$LOGS/extension.status" ]; do sleep 0.1; done
  cat "$LOGS/extension"
  return "$(cat "$LOGS/extension.status")"
}

# gpu_tests ARGUMENT...: runs tests that need a GPU, naming each as it ends, so that a log that is cut tells.
gpu_tests() {
  [ "$DEVICE" = cuda ] && export FASTBN_REQUIRE_CUDA=1
  export OMP_NUM_THREADS=2
  exec "$PYTHON" -m pytest -v -m gpu -n "$(($(nproc) / 2))" "$@"
}

parity() { gpu_tests tests/ops/test_ops.py -k "(train or backward) and (aligned or resnet or mlp or video or pointwise)"; }

tests() { gpu_tests; }

visit() {
  [ -f "$VISIT/visit.cu" ] || leave_out "no $VISIT/visit.cu"
  command -v nvcc > /dev/null || leave_out "no nvcc"
  [ -x "$LOGS/visit.program" ] || visit_program || return
  stdbuf -oL "$LOGS/visit.program" > "$OUT/visit.csv"
  local status=$?
  echo "$(wc -l < "$OUT/visit.csv") lines"
  return "$status"
}

plans() {
  need_plans
  echo "# $(tr '\n' ' ' < "$LOGS/machine")" > "$OUT/plans.csv"
  # shellcheck disable=SC2046
  "$PLANS" --plan-seconds 3 --seconds "$((LIMIT - 5))" $(size_of_ops 3,5,16) >> "$OUT/plans.csv"
  local status=$?
  "$PYTHON" -m bench.plan_shares "$OUT/plans.csv" > "$OUT/shares.txt"
  head -n 40 "$OUT/shares.txt"
  echo "$(($(wc -l < "$OUT/plans.csv") - 2)) rows"
  return "$status"
}

refit() {
  [ -s "$OUT/plans.csv" ] || leave_out "no plans.csv"
  [ -f bench/model/loops.json ] || leave_out "no bench/model/loops.json"
  local rows=400  # some 10 s
  awk -v step="$(($(wc -l < "$OUT/plans.csv") / rows + 1))" 'NR <= 2 || NR % step == 0' "$OUT/plans.csv" > "$LOGS/some.csv"
  exec "$PYTHON" -m bench.model fit "$LOGS/some.csv" --loops bench/model/loops.json --dry-run
}

# sanitize TOOL: checks stream plans of every kind of tile on small tensors. Each shape has a process of its own, so that
# its tensors are as large as they are allocated.
sanitize() {
  need_plans
  command -v compute-sanitizer > /dev/null || leave_out "no compute-sanitizer"
  local shape status=0
  for shape in 3,8,64 37,24,1 37,24,144 45,200,49; do
    echo "-- $shape"
    compute-sanitizer --tool "$1" --error-exitcode 9 "$PLANS" --check --in-process --every 7 --shape "$shape" \
      --seconds "$((LIMIT / 6))" || status=$?
  done
  return "$status"
}

memcheck() { sanitize memcheck; }

racecheck() { sanitize racecheck; }

# profile SHAPE DIRECTION ARGUMENT...: prints counters of the stream kernel of the planner's choice, as CSV.
profile() {
  local shape=$1 direction=$2
  shift 2
  ncu --clock-control none --csv --page raw --section SpeedOfLight --section WarpStateStats --section SchedulerStats \
    --section MemoryWorkloadAnalysis --kernel-name regex:stream_ --launch-count 1 "$@" \
    "$PLANS" --shape "$shape" --dtype bfloat16 --direction "$direction" --epilogue none --planned --once --in-process
}

ncu_metrics() {
  local lsu=l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op
  echo "dram__bytes_read.sum,dram__bytes_write.sum,lts__t_sector_hit_rate.pct,smsp__inst_executed.sum,\
smsp__issue_active.avg.pct_of_peak_sustained_active,${lsu}_ld.ratio,${lsu}_st.ratio,\
l1tex__t_requests_pipe_lsu_mem_global_op_ldgsts.sum,l1tex__t_sectors_pipe_lsu_mem_global_op_ldgsts.sum"
}

counters() {
  need_plans
  command -v ncu > /dev/null || leave_out "no ncu"
  local each status=0
  for each in "128,256,784 forward" "100352,256,1 forward" "128,256,784 backward"; do
    # Some versions lack one of the metrics, and refuse them all; the sections have most.
    # shellcheck disable=SC2086
    profile $each --metrics "$(ncu_metrics)" > "$LOGS/profile" || profile $each > "$LOGS/profile" || status=$?
    grep -v '^==' "$LOGS/profile" >> "$OUT/ncu.csv"
    echo "$each: $(grep -c stream_ "$LOGS/profile") kernels"
  done
  return "$status"
}

bench() {
  local suite=visit
  [ "$DEVICE" = cuda ] || suite=quick
  # The rest of the time is for the plots, and for the last case, which may exceed the limit.
  # exec replaces this shell: the signal of `timeout` must reach bench, and bench must be waited for.
  exec "$PYTHON" -m bench --suite "$suite" --part layers --implementation torch,compile,fastbn \
    --time-limit "$((LIMIT - 20))" --json "$OUT/results.json" --plots "$LOGS/report"
}

# last NAME COUNT: prints the last lines of a step's log.
last() { [ -f "$LOGS/$1" ] && tr '\r' '\n' < "$LOGS/$1" | grep -v '^ *$' | tail -n "$2" | cut -c1-160; }

summarise() {
  local part
  printf '\n==== summary\n'
  last machine 5
  while IFS='|' read -r name outcome seconds; do
    printf '%-11s %-30s %4s s\n' "$name" "$outcome" "$seconds"
  done < "$LOGS/status"
  for part in "check 6" "parity 4" "visit 2" "plans 42" "refit 20" "tests 6" "memcheck 6" "counters 4" "racecheck 4" "bench 24"; do
    [ -f "$LOGS/${part% *}" ] || continue
    printf -- '-- %s\n' "${part% *}"
    last "${part% *}" "${part#* }"
  done
}

for name in $(declare -F | cut -d' ' -f3); do export -f "${name?}"; done
export OUT DEVICE PYTHON SECONDS_IN_ALL LOGS PLANS GIVEN_PLANS VISIT LEFT_OUT

timeout --signal=TERM --kill-after=5 "$SECONDS_IN_ALL" bash -c extension_behind &
EXTENSION=$!
step machine 15
step kernels 40
step check 40
step build 60
step parity 25
step visit 35
step plans 60
step refit 15
step tests 45
step memcheck 30
step counters 25
step bench 85
[ -d "$LOGS/report" ] && tar -czf "$OUT/report.tar.gz" -C "$LOGS" report
step racecheck "$SECONDS_IN_ALL"

cat "$OUT/summary.txt"
! grep -qvE '\|(ok|left out[^|]*)\|' "$LOGS/status"
