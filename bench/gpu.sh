#!/usr/bin/env bash
# Everything there is to check and measure on a machine with a GPU, in under nine minutes: build, the kernels' tests on
# the GPU, the compilation report of the chip, the kernel benchmark, the engine's tests on the GPU, the benches of rollouts
# and of a small iteration, compute-sanitizer, and the pytest suites at their smallest sizes. Needs no network.
#
#   bench/gpu.sh            # results in bench/results/gpu
#   OUT=/tmp/gpu bench/gpu.sh
#
# The active Python must have torch with CUDA, triton, transformers, setuptools from 77 on, pybind11, pytest and rich; it
# gets the package (pip install --no-deps). Each step has a limit of its own and none begins in the last 20 seconds. A
# step that fails does not stop the others; the exit status is then 1. OUT gets a log of all steps, the JSON files and
# the summary. Without accelerate or tensorboard the engine's benches are left out.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

OUT=${OUT:-bench/results/gpu}
PYTHON=${PYTHON:-python3}
SECONDS=0
readonly ALL=530 # seconds

missing() {
    "$PYTHON" - <<'EOF' || echo "a working $PYTHON"
from importlib.metadata import version
from importlib.util import find_spec

for name in ("torch", "triton", "transformers", "setuptools", "pybind11", "pytest", "rich"):
    if find_spec(name) is None:
        print(f"the Python package {name}")
if find_spec("setuptools") is not None and int(version("setuptools").split(".")[0]) < 77:
    print(f"setuptools from 77 on, found {version('setuptools')}")
if find_spec("torch") is not None:
    import torch

    if not torch.cuda.is_available():
        print("a GPU: torch.cuda.is_available() is false")
EOF
    command -v g++ >/dev/null || command -v c++ >/dev/null || echo "a C++ compiler"
}

lacking=$(missing)
if [[ -n $lacking ]]; then
    printf 'bench/gpu.sh needs:\n%s\n' "$lacking" >&2
    exit 2
fi

mkdir -p "$OUT" || exit 2
LOG=$OUT/gpu.log
SUMMARY=$OUT/summary.txt
: >"$LOG"
: >"$SUMMARY"
failures=0

# step NAME LIMIT COMMAND...: runs the command, at most LIMIT seconds of what is left, its output into the log
step() {
    local name=$1 limit=$2 left=$((ALL - SECONDS)) begun=$SECONDS status verdict
    shift 2
    if ((left < 20)); then
        note "$name" "no time left" 0
        failures=$((failures + 1))
        return 1
    fi
    ((limit > left)) && limit=$left
    printf '\n=== %s: %s\n' "$name" "$*" | tee -a "$LOG"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$LOG"
    status=${PIPESTATUS[0]}
    case $status in
    0) verdict=ok ;;
    124 | 137) verdict="over $limit s" ;;
    *) verdict="failed ($status)" ;;
    esac
    ((status == 0)) || failures=$((failures + 1))
    note "$name" "$verdict" $((SECONDS - begun))
    return "$status"
}

note() {
    printf '%-28s %-16s %4s s\n' "$1" "$2" "$3" >>"$SUMMARY"
}

has() {
    "$PYTHON" -c "import $1" 2>/dev/null
}

# Without hypothesis neither tests/conftest.py nor the modules that import it can be loaded: these are left out.
test_options() {
    has xdist && echo "-n 8"
    has hypothesis && return
    echo "--confcutdir=tests/kernels"
    grep -rl --include='test_*.py' '^\(import\|from\) hypothesis' tests/kernels | sed 's/^/--ignore=/'
}

step build 120 "$PYTHON" -m pip install --no-deps --no-build-isolation --quiet . || {
    cat "$SUMMARY"
    exit 1
}
has hypothesis || note "tests that need hypothesis" skipped 0

mapfile -t options < <(test_options | tr ' ' '\n')
step tests 200 "$PYTHON" -m pytest tests/kernels -q -p no:cacheprovider "${options[@]}"

chip=$("$PYTHON" -c 'import torch; print("sm_%d%d" % torch.cuda.get_device_capability())')
case $chip in
sm_80 | sm_86 | sm_89 | sm_90 | sm_100 | sm_120)
    step compile_report 90 "$PYTHON" bench/compile_report.py --chips "$chip" --jobs 8 --json "$OUT/compile_report.json"
    ;;
*) note compile_report "not for $chip" 0 ;;
esac
step bench_kernels 200 "$PYTHON" bench/bench_kernels.py --device cuda --json "$OUT/kernels.json"
has ppomax.engine.ppo && engine=there || engine=
if [[ $engine ]]; then
    if has hypothesis; then
        step engine_tests 90 "$PYTHON" -m pytest tests/engine/test_{rollout,low_memory,flash}.py -k on_a_gpu -q -rs \
            -p no:cacheprovider
    else
        note "engine's tests on a GPU" skipped 0
    fi
    step bench_rollout 90 "$PYTHON" bench/bench_rollout.py --device cuda --rounds 1 --json "$OUT/rollout.json"
    step bench_iteration 60 "$PYTHON" bench/bench_iteration.py --device cuda --small --json "$OUT/iteration.json"
else
    note "rollouts, iteration" "no engine" 0 # one of its dependencies is not there
fi

# Each kernel a few times at odd sizes: launches are some hundred times slower there. Torch's cache of memory would hide
# accesses past an end.
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        step "$tool" 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$PYTHON" bench/bench_kernels.py --device cuda --check
    done
else
    note compute-sanitizer "not installed" 0
fi

if [[ $engine ]] && has pytest_benchmark; then
    step bench_suite 90 "$PYTHON" -m pytest bench --benchmark-only --quick -q -rs -p no:cacheprovider \
        --benchmark-json "$OUT/suite.json"
else
    note bench_suite skipped 0
fi

printf '\n'
cat "$SUMMARY"
((failures == 0))
