#!/usr/bin/env bash
# Fuzzes packets through a whole engine and configuration files, `make fuzz`: tests/fuzz.sh SECONDS-FOR-EACH.
#
#	tests/fuzz.sh keep      puts what was found into the corpus, as few and as short inputs as reach all edges
#
# The corpus in dataplane/fuzz/corpus is the start: a line in hexadecimal for each input (TARGET.hex), and example files.
# It is changed by `keep` only; what the fuzzer finds on the way stays in .build/fuzz/found for the next run. Exit
# status: 0 nothing found; 1 an input that crashes, its file is named.
set -euo pipefail
cd "$(dirname "$0")/.."
corpus=dataplane/fuzz/corpus
longest_kept=1000 # bytes

unpack() { # TARGET: the corpus as files, as libFuzzer wants it
	local line number=0 into=".build/fuzz/corpus/$1"
	rm -rf "$into"
	mkdir -p "$into"
	[ ! -d "$corpus/$1" ] || cp "$corpus/$1"/* "$into"
	while read -r line; do
		number=$((number + 1))
		# shellcheck disable=SC2001
		printf '%b' "$(sed 's/../\\x&/g' <<<"$line")" >"$into/$number"
	done <"$corpus/$1.hex"
}

keep() { # TARGET
	local file merged=".build/fuzz/merged/$1"
	rm -rf "$merged"
	mkdir -p "$merged"
	".build/fuzz/fuzz-$1" -merge=1 -use_counters=0 -max_len="$longest_kept" -verbosity=0 \
		"$merged" ".build/fuzz/corpus/$1" ".build/fuzz/found/$1"
	for file in "$merged"/*; do
		od -An -v -tx1 "$file" | tr -d ' \n'
		printf '\n'
	done | LC_ALL=C sort >"$corpus/$1.hex"
	printf 'fuzz: %s: %d inputs kept in %s\n' "$1" "$(wc -l <"$corpus/$1.hex")" "$corpus/$1.hex"
}

ninja -C .build/fuzz fuzz-packet fuzz-config
for target in packet config; do
	unpack "$target"
	mkdir -p ".build/fuzz/found/$target"
	if [ "$1" = keep ]; then
		keep "$target"
	elif ! ".build/fuzz/fuzz-$target" -max_total_time="$1" -print_final_stats=1 -verbosity=0 \
		-artifact_prefix=".build/fuzz/$target-" ".build/fuzz/found/$target" ".build/fuzz/corpus/$target"; then
		printf 'fuzz: %s: found an input that crashes, see .build/fuzz/%s-*\n' "$target" "$target" >&2
		exit 1
	fi
done
