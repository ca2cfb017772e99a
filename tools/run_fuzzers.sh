#!/usr/bin/env bash
# run_fuzzers.sh BUILD [NAME...]: runs each fuzzer of BUILD for FUZZ_SECONDS (default 3) from its corpus in the
# repository; new inputs go to BUILD/corpus. Fails with the fuzzer's words where one finds something.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
build=$1
shift
seconds=${FUZZ_SECONDS:-3}
count=0
for fuzzer in $(find "$build" -type f -perm -u+x -name 'fuzz_*' | sort); do
  name=$(basename "$fuzzer")
  [ $# -gt 0 ] && [[ " $* " != *" $name "* ]] && continue
  found=$build/corpus/$name
  seeds=$root/fuzz/corpus/${name#fuzz_}
  mkdir -p "$found"
  [ -d "$seeds" ] || seeds=
  echo "$name: $seconds s"
  if ! "$fuzzer" -max_total_time="$seconds" -timeout=20 -rss_limit_mb=4096 -verbosity=0 -print_final_stats=0 \
      -artifact_prefix="$build/$name-" "$found" ${seeds:+"$seeds"} >"$build/$name.log" 2>&1; then
    tail -40 "$build/$name.log"
    exit 1
  fi
  count=$((count + 1))
done
[ $count -gt 0 ] || { echo "no fuzzer in $build: build it with 'make fuzz'"; exit 1; }
