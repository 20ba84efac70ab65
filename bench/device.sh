#!/usr/bin/env bash
# Builds, tests and benches ktmoe_np on a machine with AMX: bash bench/device.sh [section ...]
#
# Sections, all of them by default and in this order: build ctest pytest limits qwen3 sft scan tiny load more.
# Nothing is fetched. What the machine lacks may lie in .carry/: kt/ (kt-kernel's extension and its libraries, see
# bench/README.md), doctest/ (an installed doctest, for the C++ tests), prebuilt/ (an extension to take when
# none can be built here). Each section has a time limit, all together stop at TOTAL_S seconds.
# Results: $OUT (default bench/results), device.jsonl the records, tables.txt what is printed last, and the logs.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

OUT=${OUT:-bench/results}
PYTHON=$(command -v "${PYTHON:-python3}")
TOTAL_S=${TOTAL_S:-530}
MACHINE=${MACHINE:-}  # the name in the records; empty: the CPU's model
BUILD=$PWD/build/device
SITE=$BUILD/site
RECORDS=$OUT/device.jsonl
TABLES=$OUT/tables.txt
SUMMARY=""
mkdir -p "$OUT" "$BUILD"
: > "$TABLES"
export PYTHONUNBUFFERED=1 PYTHONPATH=$SITE${PYTHONPATH:+:$PYTHONPATH} CMAKE_PREFIX_PATH=$PWD/.carry/doctest

if grep -qw amx_bf16 /proc/cpuinfo; then
  export KTMOE_ISA=amx
else
  echo "no AMX on this machine: the instruction set is the library's choice" >&2
fi
PEERS=torch,numpy
if ls .carry/kt/kt_kernel/*.so > /dev/null 2>&1; then
  PEERS=$PEERS,kt-kernel
  export KTMOE_BENCH_KT_EXT=$PWD/.carry/kt
fi

# section NAME SECONDS LOG COMMAND...: runs it within its time; what it prints goes to tables.txt, errors to LOG.
section() {
  local name=$1 limit=$2 log=$OUT/$3 began=$SECONDS left=$((TOTAL_S - SECONDS)) code
  shift 3
  if ((left < 5)); then
    SUMMARY+="$name: left out, no time"$'\n'
    return 1
  fi
  ((limit > left)) && limit=$left
  echo "== $name" | tee -a "$log" >&2
  timeout -k 15 "$limit" "$@" >> "$TABLES" 2>> "$log"
  code=$?
  ((code == 124)) && code="stopped after $limit s"
  SUMMARY+="$name: ${code/#0/ok}, $((SECONDS - began)) s"$'\n'
  [[ $code == 0 ]]
}

build() {
  local options=(-S . -B "$BUILD" -G Ninja -DCMAKE_BUILD_TYPE=Release -DKTMOE_BUILD_PYTHON=ON
    -DPython_EXECUTABLE="$PYTHON" -DKTMOE_ISAS=all)
  {
    cmake "${options[@]}" -DKTMOE_BUILD_TESTS=ON || {
      echo "-- no doctest: without the C++ tests"
      cmake "${options[@]}" -DKTMOE_BUILD_TESTS=OFF
    }
    cmake --build "$BUILD" --parallel "$(nproc)"
  } 1>&2 || return
  install_from "$BUILD"
}

install_from() {
  rm -rf "$SITE"
  mkdir -p "$SITE"
  cp -r src/ktmoe_np "$SITE/"
  rm -f "$SITE"/ktmoe_np/*.so
  cp "$1"/kt_kernel_ext*.so "$SITE/ktmoe_np/" || return
  "$PYTHON" -c "import ktmoe_np; print(ktmoe_np.isa_info(), ktmoe_np.kt_kernel_ext.topology())"
}

run_ctest() {
  if [[ -x $BUILD/ktmoe_tests ]]; then
    "$BUILD/ktmoe_tests" --minimal 1>&2
  else
    echo "C++ tests: not built, no doctest"
  fi
}

run_pytest() {
  "$PYTHON" -m pytest --maxfail=10 -q -p no:cacheprovider -W default::pytest.PytestConfigWarning \
    --ignore=tests/gates tests 1>&2  # the gates are about the sources, not the machine
}

bench() { "$PYTHON" -m bench.ops.bench_moe --machine "$MACHINE" --out "$RECORDS" "$@"; }

limits() {
  local limits=("$PYTHON" -m bench.ops.bench_limits --machine "$MACHINE" --out "$RECORDS")
  if [[ -n ${KTMOE_ISA:-} ]]; then "${limits[@]}" --isa "$KTMOE_ISA" --seconds 3; fi
  env -u KTMOE_ISA "${limits[@]}" --isa avx2,avx512,avx512_bf16 --seconds 0.7
}

# The tile unit slows down under sustained load: where it is the limit, the limit is measured for seconds.
qwen3() {
  bench --seconds 0.6 --limit-seconds 0.6 --peers "$PEERS" --tokens 1,2,4,8,16,64,256,1024
  bench --seconds 0.6 --limit-seconds 3 --peers "$PEERS" --tokens 4096
}

# Training steps; bench_sft measures that limit for seconds by itself.
sft() {
  "$PYTHON" -m bench.ops.bench_sft --machine "$MACHINE" --out "$RECORDS" --seconds 0.6 --limit-seconds 0.6 \
    --peers "${PEERS/,numpy/}" --tokens 64,512,1024,4096
}

tiny() {
  bench --tiny --seconds 0.5 --peers "$PEERS"
  # The tile unit beside its emulator: both are checked, and whether their bits agree is said below the table.
  if [[ -n ${KTMOE_ISA:-} ]]; then
    bench --shape tiny --tokens 1,33 --isa "$KTMOE_ISA,amx_emu" --seconds 0.1 --limit-seconds 0.05
  fi
}

more() {
  local peers=${PEERS/,numpy/}
  bench --shape mixtral,gpt-oss,dsv3 --most-experts 64 --tokens 1,64,1024 --seconds 0.4 --limit-seconds 0.4 \
    --peers "$peers"
}

# Functions run under `timeout` in a shell of their own.
export -f build install_from run_ctest run_pytest bench limits qwen3 sft tiny more
export OUT PYTHON MACHINE BUILD SITE RECORDS PEERS

for name in ${*:-build ctest pytest limits qwen3 sft scan tiny load more}; do
  case $name in
    build)
      if ! section build 200 build.log bash -c build && [[ -d .carry/prebuilt ]]; then
        section prebuilt 20 build.log bash -c 'install_from .carry/prebuilt'
      fi
      ;;
    ctest) section ctest 60 tests.log bash -c run_ctest ;;
    pytest) section pytest 150 tests.log bash -c run_pytest ;;
    limits) section limits 45 bench.log bash -c limits ;;
    qwen3) section qwen3 150 bench.log bash -c qwen3 ;;
    sft) section sft 120 bench.log bash -c sft ;;
    scan)
      section scan 60 bench.log bash -c \
        'bench --thread-scan --tokens 1,64,1024 --seconds 0.25 --limit-seconds 0.6'
      ;;
    tiny) section tiny 30 bench.log bash -c tiny ;;
    load)
      section load 50 bench.log bash -c \
        'bench --load --checkpoint-dir "$BUILD" --peers "$(grep -o kt-kernel <<< "$PEERS")"'
      ;;
    more) section more 120 bench.log bash -c more ;;
    *) echo "no section $name" >&2 ;;
  esac
done

tail -n 3 "$OUT/tests.log" 2> /dev/null
cat "$TABLES"
printf '\n%s' "$SUMMARY"
