#!/usr/bin/env bash
# Fuzzes packets through a whole engine and configuration files, `make fuzz`: tests/fuzz.sh SECONDS-FOR-EACH.
#
# The corpus in dataplane/fuzz/corpus is the start and is not changed; what the fuzzer finds on the way is kept in
# .build/fuzz/found for the next run. Exit status: 0 nothing found; 1 an input that crashes, its file is named.
set -euo pipefail
cd "$(dirname "$0")/.."
ninja -C .build/fuzz fuzz-packet fuzz-config
for target in packet config; do
	mkdir -p ".build/fuzz/found/$target"
	corpus=(".build/fuzz/found/$target")
	[ ! -d "dataplane/fuzz/corpus/$target" ] || corpus+=("dataplane/fuzz/corpus/$target")
	if ! ".build/fuzz/fuzz-$target" -max_total_time="$1" -print_final_stats=1 -verbosity=0 \
		-artifact_prefix=".build/fuzz/$target-" "${corpus[@]}"; then
		printf 'fuzz: %s: found an input that crashes, see .build/fuzz/%s-*\n' "$target" "$target" >&2
		exit 1
	fi
done
