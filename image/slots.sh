#!/bin/sh
# The gateway's two slots: which image runs, which one can, and changing that. Installed as /usr/sbin/dsnat-image.
#
#	dsnat-image status                             what runs, what else could, who may sign updates
#	dsnat-image update [VERSION] [--from PLACE]    writes the slot that does not run; the next start tries it
#	dsnat-image rollback                           back to the other slot, with a restart; this one is not tried again
#	dsnat-image factory-reset --yes                restart with an empty /var; identity and both images stay
#
# PLACE is a folder (default: /var/updates, where the fleet tool puts what it sends) or the URL of an HTTP server. Both
# hold what `make image` puts beside an image. An image that was built with keys takes only what they signed
# (SHA256SUMS.gpg); one without takes nothing from an HTTP server, and from a folder what SHA256SUMS says.
#
# The order makes a power cut harmless: the idle slot is emptied with its boot entry first, then its partitions are
# written, the UKI comes last and whole (renamed into place), with three tries. The running slot is never touched.
#
# Exit status: 0 done; 1 failed, the running image is untouched; 2 wrong usage; 3 refused, and why.
set -u
PATH=$PATH:/usr/lib/systemd
root=${DSNAT_ROOT:-} # of a made-up gateway, in tests
definitions=$root/usr/lib/sysupdate.d
keyring=$root/usr/lib/systemd/import-pubring.gpg
updates=$root/var/updates
efivars=$root/sys/firmware/efi/efivars
wish=$efivars/DsnatFactoryReset-7d3f0b6e-6a0b-4f5c-9d7e-0c1a2b3c4d5e
# shellcheck source=/dev/null
. "$root/usr/lib/os-release"
running=${IMAGE_VERSION:?}

say() { printf 'dsnat-image: %s\n' "$*"; }
fail() { printf 'dsnat-image: %s\n' "$*" >&2; exit 1; }
refuse() { printf 'dsnat-image: %s\n' "$*" >&2; exit 3; }
usage() {
	echo "usage: dsnat-image status | update [VERSION] [--from FOLDER|URL] | rollback | factory-reset --yes" >&2
	exit 2
}

entries() { # lines "VERSION TRIES FILE" of the boot partition; TRIES is "-" for one that was good
	for file in "$boot"/EFI/Linux/gateway_*.efi; do
		[ -e "$file" ] || continue
		name=$(basename "$file" .efi)
		case $name in
		*+*) tries=${name##*+} tries=${tries%%-*} name=${name%+*} ;;
		*) tries=- ;;
		esac
		echo "${name#gateway_} $tries $file"
	done
}
trial() { [ "$(systemd-bless-boot status 2>/dev/null)" = indeterminate ]; }
signed() { [ -s "$keyring" ]; }

status() {
	for line in $(entries | sed 's/ /|/g'); do
		version=${line%%|*} rest=${line#*|} tries=${rest%%|*}
		case $tries in -) word=good ;; 0) word="failed, not tried any more" ;; *) word="on trial, $tries tries left" ;; esac
		[ "$version" != "$running" ] || word="runs, $word"
		printf '%-20s %s\n' "$version" "$word"
	done
	if signed; then echo "updates must be signed"; else echo "updates are not signed: this image was built without keys"; fi
	[ ! -e "$wish" ] || echo "factory reset at the next start"
}

# ---- update ------------------------------------------------------------------------------------------------------

check_folder() { # folder, version: everything is there, and is what its maker signed
	[ -e "$1/gateway_$2.efi" ] || refuse "$1 does not hold version $2; the files beside the image belong there"
	if signed; then
		home=$(mktemp -d)
		gpg --batch --no-options --homedir "$home" --no-default-keyring --keyring "$keyring" --trust-model always \
			--verify "$1/SHA256SUMS.gpg" "$1/SHA256SUMS" 2> "$home/said" || {
			said=$(grep -v "^gpg: directory\|keybox" "$home/said" | tail -n 1)
			rm -rf "$home"
			refuse "$1/SHA256SUMS is not signed by a key that this image knows (${said:-no signature}); nothing was written"
		}
		rm -rf "$home"
	fi
	for file in "$1/gateway_$2."*; do
		name=$(basename "$file")
		case $name in *.efi | *.root-x86-64*.raw | *.root-x86-64*.raw.gz) ;; *) continue ;; esac
		if [ -e "$1/SHA256SUMS" ]; then
			wanted=$(awk -v name="$name" '$2 == name || $2 == "*" name { print $1 }' "$1/SHA256SUMS")
			[ -n "$wanted" ] || { signed || continue; refuse "$name is not in SHA256SUMS; nothing was written"; }
			found=$(sha256sum < "$file")
			[ "$wanted" = "${found%% *}" ] || refuse "$file is not what SHA256SUMS says; fetch it again; nothing was written"
		fi
	done
}

elsewhere() { # type, place -> a copy of the transfers that reads from there
	copy=$(mktemp -d)
	for file in "$definitions"/*.transfer; do
		awk -v type="$1" -v place="$2" '
			/^\[/ { section = $0 }
			section == "[Source]" && /^Type=/ { $0 = "Type=" type }
			section == "[Source]" && /^Path=/ { $0 = "Path=" place }
			{ print }' "$file" > "$copy/$(basename "$file")"
	done
	echo "$copy"
}

newest() { # folder -> the newest version in it
	for file in "$1"/gateway_*.efi; do
		[ -e "$file" ] && basename "$file" .efi | sed 's/^gateway_//'
	done | sort -V | tail -n 1
}

update() {
	version= from=$updates
	while [ $# -gt 0 ]; do
		case $1 in
		--from) [ $# -gt 1 ] || usage; from=$2; shift ;;
		-*) usage ;;
		*) [ -z "$version" ] || usage; version=$1 ;;
		esac
		shift
	done
	! trial || refuse "version $running is on trial itself; wait until dsnat-healthy.service has found it well"
	transfers=$definitions
	case $from in
	http://* | https://*)
		signed || refuse "this image was built without keys and takes nothing from a server; use dsnat-fleet update, which sends files over SSH"
		transfers=$(elsewhere url-file "$from")
		;;
	*)
		[ -n "$version" ] || version=$(newest "$from")
		[ -n "$version" ] || refuse "$from holds no image; the files beside the image belong there"
		check_folder "$from" "$version"
		[ "$from" = "$updates" ] || transfers=$(elsewhere regular-file "$from")
		;;
	esac
	[ "$version" != "$running" ] || { say "$running runs already"; exit 0; }

	# The idle slot and its entry go first: a version that is there already, half-written or failed, is written again.
	systemd-sysupdate --definitions="$transfers" --instances-max=1 vacuum > /dev/null || fail "the idle slot could not be emptied; systemd-sysupdate says why"
	rm -f "$boot"/EFI/Linux/.#* # of an update that was cut
	uki=$(entries | awk -v version="$running" '$1 == version { print $3 }')
	wanted=$(($(stat -c %s "$uki") / 1024 * 3 / 2))
	free=$(df -Pk "$boot" | awk 'NR == 2 { print $4 }')
	[ "$free" -ge "$wanted" ] || fail "the boot partition has $((free >> 10)) MiB free and an update needs $((wanted >> 10)) MiB; $boot/EFI/Linux holds what is in the way"

	# shellcheck disable=SC2086 # no version: the newest
	systemd-sysupdate --definitions="$transfers" update $version || {
		systemd-sysupdate --definitions="$transfers" --instances-max=1 vacuum > /dev/null
		fail "the update was not written; $running stays"
	}
	found=$(entries | awk -v running="$running" '$1 != running { print $1, "has", $2, "tries" }')
	[ -n "$found" ] || { say "there is nothing newer than $running"; exit 0; }
	sync
	say "$found from the next start on; $running stays beside it"
}

# ---- back --------------------------------------------------------------------------------------------------------

rollback() {
	[ $# -eq 0 ] || usage
	all=$(entries)
	other=$(printf '%s\n' "$all" | awk -v running="$running" '$1 != running { print; exit }')
	[ -n "$other" ] || refuse "there is no other image to go back to; $running stays"
	version=${other%% *} rest=${other#* }
	[ "${rest%% *}" != 0 ] || refuse "the other image, $version, failed its three tries; $running stays"
	mine=$(printf '%s\n' "$all" | awk -v running="$running" '$1 == running { print $3; exit }')
	# No tries left: the boot loader puts it last. A default entry in its place would also win over the next update.
	mv "$mine" "${mine%/*}/gateway_$running+0-3.efi" || fail "the boot entry of $running could not be changed; nothing happens"
	sync
	say "going back to $version; $running is not tried again until it is written again"
	systemctl reboot
}

factory_reset() {
	[ "${1:-}" = --yes ] || refuse "this empties /var: configuration, journal, and an SSH host key that was not given. Say: dsnat-image factory-reset --yes"
	[ -e "$wish" ] || printf '\007\000\000\000\001' > "$wish" || fail "the wish could not be stored in the firmware"
	say "restarting with an empty /var"
	systemctl reboot
}

[ $# -gt 0 ] || usage
verb=$1
shift
boot=$(bootctl --print-boot-path 2>/dev/null) || refuse "no boot partition was found; this gateway did not start through UEFI"
case $verb in
status) status ;;
update) update "$@" ;;
rollback) rollback "$@" ;;
factory-reset) factory_reset "$@" ;;
*) usage ;;
esac
