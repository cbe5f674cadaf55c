#!/usr/bin/env bash
# The set-up for a fresh Debian 12 or 13, and a fast no-op on a machine that has everything.
#
# It installs three things and says so first: Debian packages (with apt-get, needs root), the Python environment .venv
# from provision/requirements.lock, every file checked against its hash, and the image tools in .build/tools (a Debian 13
# tree with mkosi; needs root, without it only the image cannot be built). Nothing else on the machine changes: services
# of packages that were not there before are neither started now nor at the next boot.
#
# Exit status: 0 done, or nothing to do; 1 a step failed (its last lines are shown), or .build is somebody else's; 3
# packages are missing and we are not root (the one line to run is printed); 4 not enough disk space; 5 not a Debian
# that we know how to set up.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(
	# the engine
	gcc libc6-dev meson ninja-build pkgconf libdpdk-dev libyaml-dev libjansson-dev libmnl-dev libnetfilter-queue-dev
	libnftables-dev libpcap-dev libsodium-dev libsystemd-dev clang libclang-rt-dev z3
	# the image: mkosi itself comes in its own tools tree
	mmdebstrap debian-archive-keyring binutils bmap-tools zstd qemu-system-x86 qemu-utils ovmf gpg gpg-agent openssl fdisk
	# the Python tools
	python3 python3-venv ca-certificates
	# the proof: namespaces, real clients and servers
	iproute2 procps nftables iptables ethtool tcpdump traceroute iputils-ping iputils-arping curl nginx iperf3 bind9-dnsutils
	dnsmasq-base natpmpc keepalived bird2 openssh-client openssh-server git make
	# collectors of the NAT log and of the figures
	nfdump pmacct rsyslog prometheus
	# the measurements
	valgrind util-linux dpdk-dev
)
services=(nginx:nginx keepalived:keepalived bird2:bird openssh-server:ssh nfdump:nfdump pmacct:nfacctd pmacct:pmacctd rsyslog:rsyslog
	prometheus:prometheus) # package:unit, for packages that bring a service

packages_need_mib=3000 # in /, for all packages on a bare system
tree_needs_mib=6000    # in the checkout: tools tree, package cache, image, logs
venv_needs_mib=1000    # in the checkout: only .venv is made again

say() { printf 'setup: %s\n' "$*"; }
die() { local status=$1; shift; printf 'setup: %s\n' "$*" >&2; exit "$status"; }

free_mib() { df --output=avail -m "$1" | tail -n 1 | tr -d ' '; }
enough_space() { # directory, MiB, for what
	local have; have=$(free_mib "$1")
	[ "$have" -ge "$2" ] || die 4 "$1 has $have MiB free but $3 needs $2 MiB; free some space and run again"
}

missing_packages() {
	local have; have=$(dpkg-query -W -f '${db:Status-Abbrev} ${Package}\n' "${packages[@]}" 2>/dev/null || true)
	printf '%s\n' "${packages[@]}" | grep -Fxv -f <(sed -n 's/^ii *//p' <<<"$have") || true
}

# Debian starts a package's service as soon as it is unpacked. A policy-rc.d that says no keeps nginx, keepalived and
# sshd from opening ports on the operator's machine; an existing policy of the operator's is left alone.
policy=${SETUP_POLICY:-/usr/sbin/policy-rc.d} # a test puts it elsewhere
forbid_service_starts() {
	[ ! -e "$policy" ] || return 0
	trap 'rm -f "$policy"' EXIT
	printf '#!/bin/sh\nexit 101\n' >"$policy"
	chmod +x "$policy"
}

install_packages() {
	local log=.build/setup-apt.log apt=(apt-get -q -o DPkg::Lock::Timeout=300) item
	export DEBIAN_FRONTEND=noninteractive
	forbid_service_starts
	if ! { "${apt[@]}" update && "${apt[@]}" install -y --no-install-recommends "$@"; } >"$log" 2>&1; then
		tail -n 20 "$log" >&2
		die 1 "apt-get could not install the packages (whole log: $log); mend what it says and run again"
	fi
	for item in "${services[@]}"; do # only what we brought in ourselves
		case " $* " in *" ${item%%:*} "*) systemctl disable "${item##*:}" >>"$log" 2>&1 || true ;; esac
	done
}

make_venv() {
	local log=.build/setup-python.log
	if ! { rm -rf .venv && /usr/bin/python3 -m venv .venv &&
		.venv/bin/pip install --disable-pip-version-check --require-hashes -r provision/requirements.lock &&
		.venv/bin/pip install --disable-pip-version-check --no-deps --no-build-isolation --editable .; } >"$log" 2>&1; then
		tail -n 20 "$log" >&2
		die 1 "the Python environment could not be made (whole log: $log); mend what it says and run again"
	fi
}

[ -x /usr/bin/dpkg-query ] || die 5 "this is not a Debian system; run it on Debian 12 or 13"
mkdir -p .build
if [ ! -w .build ] || { [ -e .build/setup.lock ] && [ ! -w .build/setup.lock ]; }; then
	die 1 ".build is $(stat -c %U .build)'s and you are $(id -un); run as $(stat -c %U .build), or begin anew with: sudo rm -rf .build .venv"
fi
exec 9>.build/setup.lock
if ! flock -n 9; then # two makes at once: the second finds everything done
	say "waits for another set-up of this checkout to end"
	flock 9
fi

# Asked for by what is still to be made; what an earlier set-up left, perhaps half of it, counts as had.
venv_stamp() { sha256sum provision/requirements.lock pyproject.toml tests/setup.sh /usr/bin/python3 2>/dev/null | sha256sum; }
venv_is_old() { [ "$(cat .build/setup.stamp 2>/dev/null)" != "$(venv_stamp)" ] || [ ! -x .venv/bin/pytest ]; }
tools_are_missing() { [ ! -e .build/tools/etc/dsnat-tools ] && [ "$(id -u)" -eq 0 ]; }
if tools_are_missing || [ ! -e .build/setup.stamp ]; then
	enough_space . "$((tree_needs_mib - $(du -sm .build | cut -f 1)))" "building the gateway"
elif venv_is_old; then
	enough_space . "$venv_needs_mib" "the Python environment"
fi

mapfile -t missing < <(missing_packages)
if [ "${#missing[@]}" -gt 0 ]; then
	[ "$(id -u)" -eq 0 ] || die 3 "${#missing[@]} Debian packages are missing; run: sudo apt-get install -y --no-install-recommends ${missing[*]}"
	enough_space / "$packages_need_mib" "installing Debian packages"
	say "will install ${#missing[@]} Debian packages: ${missing[*]}"
	install_packages "${missing[@]}"
	say "Debian packages installed (${SECONDS} s)"
fi

/usr/bin/python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die 5 "/usr/bin/python3 is older than 3.11; run it on Debian 12 or 13"
if venv_is_old; then
	say "will make the Python environment .venv from provision/requirements.lock"
	make_venv
	venv_stamp >.build/setup.stamp
	say "Python environment ready (${SECONDS} s)"
fi

if tools_are_missing; then
	say "will make the image tools in .build/tools"
	.venv/bin/python -m image.build --tools-only || die 1 "the image tools could not be made; mend what it says and run again"
	say "image tools ready (${SECONDS} s)"
fi
