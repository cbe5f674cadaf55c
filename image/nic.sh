#!/bin/sh
# Sets the gateway's NICs up, from /etc/dsnat/dsnatd.yaml and from what is in the machine. Installed as
# /usr/lib/dsnat/nic; dsnat-nic.service runs it at boot before networkd, the agent after a change.
#
#	nic plan     say what start would do, change nothing
#	nic start    do it; doing it again changes only what differs
#	nic watch    do the kernel's part again whenever a link changes (hot-plugged NIC, changed queues); never ends
#	nic stop     give the NICs of the engine back to the kernel
#
# A NIC belongs to one of two:
#   the engine   its driver is vfio-pci (IOMMU), uio_pci_generic (no IOMMU and no lockdown) or stays (mlx5 shares it);
#                its MAC goes to a twin, a persistent multi-queue TAP with the interface's name. That the TAP is made
#                here and not by dsnatd is why addresses, routes and VRRP survive a restart of dsnatd.
#   the kernel   nothing may merge packets (gro, lro: a router must send what it got), and the queues' interrupts are
#                spread over the cores of the NIC's NUMA node that are not isolated for workers. Sending goes the
#                same way (XPS); with fewer queues than such cores, what is received is spread by hash (RPS).
# Never taken: the NIC of the management interface, the one that an SSH session to us comes in by, the last one left.
#
# Exit status: 0 done; 1 a NIC could not be set up (all others were); 2 wrong usage or configuration.
set -u
config=${DSNAT_CONFIG:-/etc/dsnat/dsnatd.yaml}
state=${DSNAT_STATE:-/run/dsnat-nic}
sys=${DSNAT_SYS:-/sys}
proc=${DSNAT_PROC:-/proc}
verb=${1:-}
failed=0

say() { printf 'dsnat-nic: %s\n' "$*" >&2; }
fail() { say "$*"; failed=1; }

# Runs a command, or shows it when only planning.
run() {
	if [ "$verb" = plan ]; then
		printf '%s\n' "$*"
	else
		"$@"
	fi
}
write() { # value file
	if [ "$verb" = plan ]; then
		[ "$(cat "$2" 2>/dev/null)" = "$1" ] || printf 'echo %s > %s\n' "$1" "$2"
	else
		printf '%s\n' "$1" > "$2"
	fi
}

# ---- what there is -----------------------------------------------------------------------------------------------

facts() { # lines of `dsnatd --facts`: interface NAME ROLE PATH DEVICE, member NAME DEVICE
	[ -e "$config" ] || return 0
	dsnatd --facts "$config"
}
kernel_nics() { # interfaces with hardware below them
	for path in "$sys"/class/net/*/device; do
		[ -e "$path" ] || continue
		path=${path%/device}
		echo "${path##*/}"
	done
}
nic_of_pci() { # PCI address -> kernel interface, or nothing; virtio has a device of its own in between
	for path in "$sys/bus/pci/devices/$1"/net/* "$sys/bus/pci/devices/$1"/virtio*/net/*; do
		[ -e "$path" ] && echo "${path##*/}"
	done
}
ssh_nics() { # interfaces whose address an SSH session came in to
	ss -Htn state established '( sport = :22 )' 2>/dev/null | awk '{ sub(/:[0-9]+$/, "", $3); print $3 }' | sort -u |
		while read -r address; do
			ip -o address show to "${address#::ffff:}" 2>/dev/null | awk '{ print $2 }'
		done
}
why_not_take() { # kernel interface -> a reason, or nothing
	if [ "$1" = mgmt0 ]; then
		echo "it is the management interface"
	elif ssh_nics | grep -qx "$1"; then
		echo "an SSH session to this gateway comes in by it"
	elif [ "$(kernel_nics | grep -cvx "$1")" -eq 0 ]; then
		echo "it is the only NIC the kernel has, and the gateway would not be reachable"
	fi
}

# ---- NICs of the engine ------------------------------------------------------------------------------------------

driver_of() { # PCI address -> the driver bound to it, or nothing
	path=$(readlink "$sys/bus/pci/devices/$1/driver") && echo "${path##*/}"
}
driver_wanted() { # PCI address -> driver that lets the engine in, "shared", or "none: why"
	device=$sys/bus/pci/devices/$1
	if [ "$(cat "$device/vendor")" = 0x15b3 ]; then
		echo shared
	elif [ -e "$device/iommu_group" ]; then
		echo vfio-pci
	elif grep -q '\[none\]' "$sys/kernel/security/lockdown" 2>/dev/null || [ ! -e "$sys/kernel/security/lockdown" ]; then
		echo uio_pci_generic
	else
		echo "none: the machine has no IOMMU and the kernel is locked down (Secure Boot)"
	fi
}

await() { # PCI address: until udev has loaded the kernel's driver, which knows the MAC; at boot we may be early
	alias=$(cat "$sys/bus/pci/devices/$1/modalias" 2>/dev/null)
	# A cloud kernel has no driver for some NICs that DPDK has one for: none will come.
	[ -z "$alias" ] || modprobe --quiet --resolve-alias "$alias" | grep -q . || return 0
	tries=150
	while [ ! -e "$state/$1.mac" ] && [ -z "$(nic_of_pci "$1")" ] && [ "$tries" -gt 0 ]; do
		case $(driver_of "$1") in vfio-pci | uio_pci_generic) return ;; esac
		tries=$((tries - 1))
		sleep 0.2
	done
}

take() { # PCI address
	[ -e "$sys/bus/pci/devices/$1" ] || { fail "$config: there is no PCI device $1; lspci -D lists what there is"; return 1; }
	await "$1"
	nic=$(nic_of_pci "$1")
	wanted=$(driver_wanted "$1")
	case $wanted in
	none:*) fail "$1 cannot be used with path: dpdk: ${wanted#none: }; use path: nfqueue"; return 1 ;;
	shared) [ "$verb" = plan ] || cat "$sys/class/net/$nic/address" > "$state/$1.mac"; return 0 ;;
	esac
	[ "$(driver_of "$1")" != "$wanted" ] || return 0
	if [ -n "$nic" ]; then
		reason=$(why_not_take "$nic")
		[ -z "$reason" ] || { fail "$nic ($1) is not given to the engine: $reason; name another device in $config"; return 1; }
		[ "$verb" = plan ] || cat "$sys/class/net/$nic/address" > "$state/$1.mac"
		run ip link set dev "$nic" down
	fi
	run modprobe "$wanted"
	run driverctl --nosave set-override "$1" "$wanted"
	[ "$verb" = plan ] && return 0
	if [ "$(driver_of "$1")" != "$wanted" ]; then
		driverctl --nosave unset-override "$1"
		rm -f "$state/$1.mac"
		fail "$1 could not be bound to $wanted and was given back to the kernel; dmesg says why"
		return 1
	fi
	say "$1 ${nic:+($nic) }is the engine's, driver $wanted"
}

twin() { # interface name, PCI address or empty
	if ! ip link show dev "$1" > /dev/null 2>&1; then
		run ip tuntap add dev "$1" mode tap multi_queue || { fail "the twin $1 could not be made"; return 1; }
	fi
	mac=$(cat "$state/$2.mac" 2>/dev/null)
	if [ -n "$mac" ] && [ "$(cat "$sys/class/net/$1/address" 2>/dev/null)" != "$mac" ]; then
		run ip link set dev "$1" address "$mac"
	fi
	run ip link set dev "$1" up
	[ "$verb" = plan ] || : > "$state/$1.twin"
}

give_back() { # lines "NAME DEVICE": what an earlier configuration took and this one does not name
	for file in "$state"/*.mac "$state"/*.twin; do
		[ -e "$file" ] || continue
		name=$(basename "${file%.*}")
		printf '%s\n' "$1" | tr ' ' '\n' | grep -qxF "$name" && continue
		case $file in
		*.twin) run ip link delete dev "$name" ;;
		*.mac) case $(driver_of "$name") in vfio-pci | uio_pci_generic) run driverctl --nosave unset-override "$name" ;; esac ;;
		esac
		run rm -f "$file"
	done
}

hugepages() { # half of each node's memory, at most 8 GiB a node; taken once, before memory is in pieces
	for node in "$sys"/devices/system/node/node[0-9]*; do
		pages=$node/hugepages/hugepages-2048kB/nr_hugepages
		[ -e "$pages" ] || continue
		wanted=$(awk '/MemTotal:/ { n = int($4 / 4096); print (n > 4096 ? 4096 : n) }' "$node/meminfo")
		[ "$(cat "$pages")" -ge "$wanted" ] && continue
		write "$wanted" "$pages"
		[ "$verb" = plan ] && continue
		got=$(cat "$pages")
		[ "$got" -ge $((wanted / 2)) ] || fail "only $got of $wanted huge pages on ${node##*/}; memory is in pieces, a reboot helps"
	done
}

# ---- NICs of the kernel ------------------------------------------------------------------------------------------

cpus() { # "0-2,5" -> 0 1 2 5
	printf '%s\n' "$1" | tr ',' '\n' | awk -F- 'NF { for (i = $1; i <= ($2 == "" ? $1 : $2); i++) print i }'
}
housekeeping() { # kernel interface -> its NUMA node's cores that are not isolated, else all that are not
	isolated=" $(cpus "$(cat "$sys/fs/cgroup/cpuset.cpus.isolated" "$sys/devices/system/cpu/isolated" 2>/dev/null | paste -sd,)" | paste -sd' ') "
	node=$(cat "$sys/class/net/$1/device/numa_node" 2>/dev/null || echo -1)
	for list in "$sys/devices/system/node/node$node/cpulist" "$sys/devices/system/cpu/online"; do
		[ -e "$list" ] || continue
		found=$(for cpu in $(cpus "$(cat "$list")"); do case $isolated in *" $cpu "*) ;; *) echo "$cpu" ;; esac; done)
		[ -n "$found" ] && { echo "$found"; return; }
	done
}
no_merging() { # kernel interface
	for feature in gro lro rx-gro-hw rx-gro-list rx-udp-gro-forwarding; do
		shown=$feature
		case $feature in gro) shown=generic-receive-offload ;; lro) shown=large-receive-offload ;; esac
		ethtool -k "$1" 2>/dev/null | grep -qE "^$shown: on( \[requested.*)?$" || continue
		run ethtool -K "$1" "$feature" off 2>/dev/null # it may be gone or renamed by now
		[ "$verb" = plan ] && continue
		ethtool -k "$1" 2>/dev/null | grep -qE "^$shown: on" && fail "$1: $shown stays on; packets would be merged"
	done
}
queue_of() { # interrupt, kernel interface -> the queue it serves: what its name ends in (input.0, TxRx-3, comp2@pci)
	for name in "$proc/irq/$1"/*/; do
		name=${name%/} name=${name##*/} name=${name%%@*}
		[ "$name" = "$2" ] || printf '%s\n' "$name" | sed -n 's/.*[^0-9]\([0-9][0-9]*\)$/\1/p'
	done | head -n 1
}
spread() { # kernel interface: the interrupts of queue n, both ways, to the n-th core; from the first again when they run out
	nic=$1 n=0
	# virtio keeps its interrupts one level up, at the PCI device
	irqs=$(ls "$sys/class/net/$1/device/msi_irqs" "$sys/class/net/$1/device/../msi_irqs" 2>/dev/null | grep -E '^[0-9]+$' | sort -n)
	[ -n "$irqs" ] || return 0
	set -- $(housekeeping "$1")
	for irq in $irqs; do
		[ -e "$proc/irq/$irq/smp_affinity_list" ] || continue
		queue=$(queue_of "$irq" "$nic")
		eval "cpu=\${$((${queue:-$n} % $# + 1))}"
		n=$((n + 1))
		read -r now < "$proc/irq/$irq/smp_affinity_list"
		# Some interrupts cannot be moved (the kernel manages them); that is no fault.
		[ "$now" = "$cpu" ] || write "$cpu" "$proc/irq/$irq/smp_affinity_list" 2>/dev/null || true
	done
}

mask() { # cores -> the kernel's hexadecimal mask, in groups of 32 from the right
	printf '%s\n' "$@" | awk '
		{ if ($1 > top) top = $1; word[int($1 / 32)] += 2 ^ ($1 % 32) }
		END { for (i = int(top / 32); i >= 0; i--) printf "%s%08x", (i < int(top / 32) ? "," : ""), word[i]; print "" }'
}
every() { # step, first, cores -> each step-th core from the first one on; more queues than cores share them again
	step=$1 first=$2
	shift 2
	[ "$first" -lt $# ] || first=$((first % $#))
	printf '%s\n' "$@" | awk -v step="$step" -v first="$first" '(NR - 1) % step == first'
}
steer() { # kernel interface
	queues=$sys/class/net/$1/queues
	n=$(ls -d "$queues"/rx-* 2>/dev/null | grep -c .)
	[ "$n" -gt 0 ] || return 0
	set -- $(housekeeping "$1")
	rps=0
	[ "$n" -ge $# ] || rps=$(mask "$@")
	for queue in "$queues"/rx-*; do
		same "$rps" "$queue/rps_cpus" || write "$rps" "$queue/rps_cpus" 2>/dev/null || true
	done
	# A single queue has no choice, and the kernel refuses to be told.
	n=$(ls -d "$queues"/tx-* 2>/dev/null | grep -c .)
	[ "$n" -gt 1 ] || return 0
	for queue in "$queues"/tx-*; do
		[ -e "$queue/xps_cpus" ] || continue
		xps=$(mask $(every "$n" "${queue##*-}" "$@"))
		same "$xps" "$queue/xps_cpus" || write "$xps" "$queue/xps_cpus" 2>/dev/null || true
	done
}
same() { # mask, file: equal but for zeros in front, which depend on how many cores the kernel was built for
	[ "$(printf %s "$1" | tr -d , | sed 's/^0*//')" = "$(tr -d , < "$2" 2>/dev/null | sed 's/^0*//')" ]
}

# ---- verbs -------------------------------------------------------------------------------------------------------

start() {
	known=$(facts) || { say "$config is not valid; the NICs stay as they are"; exit 2; }
	dpdk=$(printf '%s\n' "$known" | awk '$1 == "interface" && $4 == "dpdk" { print $2, $5 } $1 == "member" { print "-", $3 }')
	[ "$verb" = plan ] || mkdir -p "$state"
	give_back "$dpdk"
	if [ -n "$dpdk" ]; then
		hugepages
		while read -r name device; do
			case $device in
			[0-9a-f]*:[0-9a-f]*:[0-9a-f]*.[0-7]) take "$device" && { [ "$name" = - ] || twin "$name" "$device"; } ;;
			*) [ "$name" = - ] || twin "$name" "" ;;
			esac
		done <<-X
			$dpdk
		X
	fi
	for nic in $(kernel_nics); do
		keep "$nic"
	done
}

keep() { # kernel interface
	no_merging "$1"
	spread "$1"
	steer "$1"
}

watch() {
	# Listen first, then look: nothing that happens in between is missed.
	ip -o monitor link | {
		for nic in $(kernel_nics); do
			keep "$nic"
		done
		while read -r _ nic _; do
			nic=${nic%:}
			nic=${nic%@*}
			[ -e "$sys/class/net/$nic/device" ] && keep "$nic"
		done
	}
}

case $verb in
start | plan) start ;;
watch) watch ;;
stop) give_back "" ;;
*) echo "usage: nic plan|start|watch|stop" >&2; exit 2 ;;
esac
exit "$failed"
