"""nic.sh on a made-up machine: what it would do (`nic plan`), and what it refuses."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

NIC = Path(__file__).resolve().parents[2] / "image/nic.sh"
MANAGEMENT, INSIDE, OUTSIDE = "0000:00:02.0", "0000:00:03.0", "0000:00:04.0"


@dataclass
class Box:
    """A /sys of three NICs, and stand-ins for the programs that nic.sh asks."""

    top: Path

    @property
    def sys(self) -> Path:
        return self.top / "sys"

    def program(self, name: str, script: str) -> None:
        path = self.top / "bin" / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def nic(self, name: str, pci: str, *, vendor: str = "0x8086", iommu: bool = False) -> None:
        device = self.sys / "devices/pci0000:00" / pci
        (device / "net" / name).mkdir(parents=True)
        (device / "vendor").write_text(f"{vendor}\n")
        (device / "net" / name / "address").write_text("52:54:00:00:00:01\n")
        if iommu:
            (device / "iommu_group").mkdir()
        for link, target in (
            (self.sys / "bus/pci/devices" / pci, device),
            (self.sys / "class/net" / name, device / "net" / name),
            (device / "net" / name / "device", device),
        ):
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(target)

    def facts(self, *lines: str) -> None:
        (self.top / "facts").write_text("".join(f"{line}\n" for line in lines))
        (self.top / "dsnatd.yaml").write_text("")

    def plan(self, verb: str = "plan") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", str(NIC), verb],
            env={
                "PATH": f"{self.top / 'bin'}:/usr/sbin:/usr/bin:/sbin:/bin",
                "DSNAT_SYS": str(self.sys),
                "DSNAT_PROC": str(self.top / "proc"),
                "DSNAT_STATE": str(self.top / "state"),
                "DSNAT_CONFIG": str(self.top / "dsnatd.yaml"),
            },
            capture_output=True,
            text=True,
            timeout=30,
        )


@pytest.fixture
def box(tmp_path: Path) -> Box:
    one = Box(tmp_path)
    (tmp_path / "bin").mkdir()
    one.program("dsnatd", f'[ "$1" = --facts ] && cat {tmp_path}/facts')
    one.program("ss", "exit 0")
    one.program("ip", '[ "$1 $2" = "link show" ] && exit 1; exit 0')
    one.program("ethtool", "echo 'generic-receive-offload: on'; echo 'large-receive-offload: off [fixed]'")
    for name, pci in (("mgmt0", MANAGEMENT), ("ens3", INSIDE), ("ens4", OUTSIDE)):
        one.nic(name, pci)
    return one


def test_without_an_iommu_a_nic_goes_to_uio_and_gets_a_twin_that_outlives_the_engine(box: Box) -> None:
    box.facts(f"interface inside0 inside dpdk {INSIDE}")
    done = box.plan()
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert f"driverctl --nosave set-override {INSIDE} uio_pci_generic" in lines
    assert "ip tuntap add dev inside0 mode tap multi_queue" in lines
    assert lines.index("ip link set dev ens3 down") < lines.index(
        f"driverctl --nosave set-override {INSIDE} uio_pci_generic"
    )


def test_behind_an_iommu_a_nic_goes_to_vfio(box: Box) -> None:
    box.nic("ens5", "0000:00:05.0", iommu=True)
    box.facts("interface outside0 outside dpdk 0000:00:05.0")
    assert "driverctl --nosave set-override 0000:00:05.0 vfio-pci" in box.plan().stdout


def test_a_locked_down_kernel_without_an_iommu_is_refused_and_nfqueue_offered(box: Box) -> None:
    lockdown = box.sys / "kernel/security/lockdown"
    lockdown.parent.mkdir(parents=True)
    lockdown.write_text("none [integrity] confidentiality\n")
    box.facts(f"interface inside0 inside dpdk {INSIDE}")
    done = box.plan()
    assert done.returncode == 1
    assert "Secure Boot" in done.stderr
    assert "use path: nfqueue" in done.stderr
    assert "set-override" not in done.stdout


def test_a_mellanox_nic_keeps_its_driver(box: Box) -> None:
    box.nic("ens6", "0000:00:06.0", vendor="0x15b3")
    box.facts("interface inside0 inside dpdk 0000:00:06.0")
    done = box.plan()
    assert done.returncode == 0, done.stderr
    assert "set-override" not in done.stdout
    assert "ip tuntap add dev inside0 mode tap multi_queue" in done.stdout


def test_the_management_nic_is_refused(box: Box) -> None:
    box.facts(f"interface inside0 inside dpdk {MANAGEMENT}")
    done = box.plan()
    assert done.returncode == 1
    assert "mgmt0 (0000:00:02.0) is not given to the engine: it is the management interface" in done.stderr
    assert "set-override" not in done.stdout


def test_a_nic_that_an_ssh_session_comes_in_by_is_refused(box: Box) -> None:
    box.program("ss", "echo '0 0 192.0.2.7:22 192.0.2.99:50000'")
    box.program(
        "ip", '[ "$1 $2" = "link show" ] && exit 1; [ "$5" = 192.0.2.7 ] && echo "3: ens3 inet"; exit 0'
    )
    box.facts(f"interface inside0 inside dpdk {INSIDE}", f"interface outside0 outside dpdk {OUTSIDE}")
    done = box.plan()
    assert done.returncode == 1
    assert (
        f"ens3 ({INSIDE}) is not given to the engine: an SSH session to this gateway comes in by it"
        in done.stderr
    )
    assert f"set-override {OUTSIDE}" in done.stdout, "the others are set up all the same"


def test_the_last_nic_is_refused(tmp_path: Path, box: Box) -> None:
    for name in ("mgmt0", "ens4"):
        (box.sys / "class/net" / name).unlink()
    box.facts(f"interface inside0 inside dpdk {INSIDE}")
    done = box.plan()
    assert done.returncode == 1
    assert "it is the only NIC the kernel has" in done.stderr


def test_a_device_that_is_not_there_is_named(box: Box) -> None:
    box.facts("interface inside0 inside dpdk 0000:00:1e.0")
    done = box.plan()
    assert done.returncode == 1
    assert "there is no PCI device 0000:00:1e.0" in done.stderr


def test_nothing_merges_packets_on_a_nic_that_the_kernel_keeps(box: Box) -> None:
    box.facts("interface wg0 inside nfqueue -")
    done = box.plan()
    assert done.returncode == 0, done.stderr
    for nic in ("mgmt0", "ens3", "ens4"):
        assert f"ethtool -K {nic} gro off" in done.stdout
        assert f"ethtool -K {nic} lro off" not in done.stdout, "it is off already, and fixed"


def queues(box: Box, nic: str, number: int, *, cores: str) -> None:
    node = box.sys / "devices/system/node/node0"
    node.mkdir(parents=True, exist_ok=True)
    (node / "cpulist").write_text(f"{cores}\n")
    (box.sys / "class/net" / nic / "device/numa_node").write_text("0\n")
    for queue in range(number):
        for kind, file in (("rx", "rps_cpus"), ("tx", "xps_cpus")):
            folder = box.sys / "class/net" / nic / f"queues/{kind}-{queue}"
            folder.mkdir(parents=True)
            (folder / file).write_text("00\n")


def steering(box: Box) -> list[str]:
    lines = [line for line in box.plan().stdout.splitlines() if "_cpus" in line]
    return [f"{line.split()[1]} {'/'.join(Path(line.split()[3]).parts[-2:])}" for line in lines]


def test_each_queue_sends_from_the_cores_that_its_interrupts_go_to(box: Box) -> None:
    queues(box, "ens3", 4, cores="0-3")
    box.facts("interface wg0 inside nfqueue -")
    assert steering(box) == [f"0000000{1 << n} tx-{n}/xps_cpus" for n in range(4)]


def test_nobody_waits_for_a_driver_that_the_kernel_does_not_have(box: Box) -> None:
    address = "0000:00:05.0"
    box.nic("gone", address)
    (box.sys / "class/net/gone").unlink()
    device = box.sys / "devices/pci0000:00" / address
    (device / "net/gone/device").unlink()
    (device / "net/gone/address").unlink()
    (device / "net/gone").rmdir()
    (device / "modalias").write_text("pci:v00008086d000010D3sv*\n")
    box.program("modprobe", "exit 1")
    box.program("sleep", f"echo slept >> {box.top}/slept")
    box.facts(f"interface inside0 inside dpdk {address}")
    done = box.plan()
    assert done.returncode == 0, done.stderr
    assert f"driverctl --nosave set-override {address} uio_pci_generic" in done.stdout
    assert not (box.top / "slept").exists()


def test_both_interrupts_of_a_queue_go_to_its_own_core(box: Box) -> None:
    """virtio has one for what is received and one for what is sent, and one more before them all."""
    (box.sys / "devices/system/cpu").mkdir(parents=True)
    (box.sys / "devices/system/cpu/online").write_text("0-3\n")
    names = ["config", *(f"{way}.{queue}" for queue in range(4) for way in ("input", "output"))]
    for number, name in enumerate(names, start=40):
        (box.sys / "devices/pci0000:00" / OUTSIDE / "msi_irqs").mkdir(exist_ok=True)
        (box.sys / "devices/pci0000:00" / OUTSIDE / "msi_irqs" / str(number)).write_text("msix\n")
        (box.top / "proc/irq" / str(number) / f"virtio2-{name}").mkdir(parents=True)
        (box.top / "proc/irq" / str(number) / "smp_affinity_list").write_text("0-3\n")
    done = box.plan()
    for number, name in enumerate(names[1:], start=41):
        queue = name[-1]
        assert f"echo {queue} > {box.top}/proc/irq/{number}/smp_affinity_list\n" in done.stdout


def test_with_fewer_queues_than_cores_received_packets_are_spread_by_hash(box: Box) -> None:
    queues(box, "ens3", 2, cores="0-3")
    box.facts("interface wg0 inside nfqueue -")
    assert steering(box) == [
        "0000000f rx-0/rps_cpus",
        "0000000f rx-1/rps_cpus",
        "00000005 tx-0/xps_cpus",
        "0000000a tx-1/xps_cpus",
    ]


def test_cores_that_workers_have_for_themselves_get_no_interrupt_and_no_packet_of_the_kernel(
    box: Box,
) -> None:
    queues(box, "ens3", 2, cores="0-3,32-33")
    isolated = box.sys / "fs/cgroup/cpuset.cpus.isolated"
    isolated.parent.mkdir(parents=True)
    isolated.write_text("1-3\n")
    box.facts("interface wg0 inside nfqueue -")
    assert steering(box) == [
        "00000003,00000001 rx-0/rps_cpus",
        "00000003,00000001 rx-1/rps_cpus",
        "00000002,00000001 tx-0/xps_cpus",
        "00000001,00000000 tx-1/xps_cpus",
    ]


def test_steering_that_is_right_already_is_not_written_again(box: Box) -> None:
    queues(box, "ens3", 2, cores="0-1")
    for queue, mask in ((0, "1"), (1, "00,00000002")):
        (box.sys / f"class/net/ens3/queues/tx-{queue}/xps_cpus").write_text(f"{mask}\n")
    box.facts("interface wg0 inside nfqueue -")
    assert steering(box) == []


def test_a_nic_that_cannot_be_bound_is_given_back_to_the_kernel(box: Box, tmp_path: Path) -> None:
    """`start`, not `plan`: driverctl says yes and nothing happens, as with a device that vfio refuses."""
    log = tmp_path / "driverctl.log"
    box.program("driverctl", f"echo $* >> {log}")
    box.program("modprobe", "exit 0")
    box.facts(f"interface inside0 inside dpdk {INSIDE}")
    done = box.plan("start")
    assert done.returncode == 1
    assert f"{INSIDE} could not be bound to uio_pci_generic and was given back to the kernel" in done.stderr
    assert log.read_text().splitlines()[-1] == f"--nosave unset-override {INSIDE}"
    assert not (tmp_path / f"state/{INSIDE}.twin").exists()


def test_a_wrong_verb_is_a_usage_error() -> None:
    done = subprocess.run(["sh", str(NIC), "dance"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage: nic" in done.stderr
