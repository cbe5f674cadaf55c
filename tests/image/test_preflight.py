"""The preflight on made-up machines: a /sys and a /proc in a folder."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

PREFLIGHT = Path(__file__).resolve().parents[2] / "image/preflight"
FLAGS = "lm cx16 lahf_lm popcnt sse4_1 sse4_2 ssse3 avx avx2 bmi1 bmi2 f16c fma movbe xsave"
MANAGEMENT, DATA = "0000:00:02.0", "0000:00:03.0"


class Box:
    def __init__(self, top: Path) -> None:
        self.top = top
        self.write("proc/cpuinfo", f"processor : 0\nflags : {FLAGS}\n\nprocessor : 1\nflags : {FLAGS}\n")
        self.write("proc/meminfo", "MemTotal: 16000000 kB\n")
        self.write("sys/devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages", "0")
        self.write("sys/class/block/sda/size", str(8 * 10**9 // 512))
        self.write("sys/class/block/sda/device/model", "disk")
        self.write("sys/firmware/efi/fw_platform_size", "64")
        self.nic("eno1", MANAGEMENT, "igb")
        self.nic("ens1", DATA, "ice")

    def write(self, name: str, text: str | bytes) -> None:
        path = self.top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())

    def link(self, name: str, target: Path) -> None:
        path = self.top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)

    def nic(self, name: str, pci: str, driver: str, *, queues: int = 4) -> None:
        device = self.top / "sys/devices/pci0000:00" / pci
        device.mkdir(parents=True)
        (device / "vendor").write_text("0x8086\n")
        (device / "device").write_text("0x1593\n")
        (device / "class").write_text("0x020000\n")
        (device / "numa_node").write_text("0\n")
        (device / "driver").symlink_to(self.top / "sys/bus/pci/drivers" / driver)
        self.link(f"sys/bus/pci/devices/{pci}", device)
        for queue in range(queues):
            (self.top / f"sys/class/net/{name}/queues/rx-{queue}").mkdir(parents=True)
        self.link(f"sys/class/net/{name}/device", device)

    def iommu(self, *groups: tuple[str, ...]) -> None:
        for number, devices in enumerate(groups):
            for pci in devices:
                self.write(f"sys/kernel/iommu_groups/{number}/devices/{pci}", "")
                if (self.top / "sys/devices/pci0000:00" / pci).exists():
                    self.link(
                        f"sys/devices/pci0000:00/{pci}/iommu_group",
                        self.top / f"sys/kernel/iommu_groups/{number}",
                    )

    def secure_boot(self) -> None:
        name = "SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
        self.write(f"sys/firmware/efi/efivars/{name}", b"\x06\0\0\0\x01")
        self.write("sys/kernel/security/lockdown", "none [integrity] confidentiality\n")

    def run(self, *words: str) -> tuple[int, dict[str, dict[str, Any]], str]:
        argv = [str(PREFLIGHT), "--root", str(self.top), "--management", "eno1", *words]
        text = subprocess.run([*argv], capture_output=True, text=True, timeout=30)
        machine = json.loads(
            subprocess.run([*argv, "--json"], capture_output=True, text=True, timeout=30).stdout
        )
        assert machine["status"] == text.returncode
        return text.returncode, {item["what"]: item for item in machine["items"]}, text.stdout


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


def test_a_server_with_an_iommu_makes_a_gateway_on_either_path(box: Box) -> None:
    box.iommu((MANAGEMENT,), (DATA,))
    status, items, text = box.run()
    assert status == 0, text
    assert items["NIC ens1"]["facts"]["paths"] == ["dpdk", "nfqueue"]
    assert "path: dpdk (net_ice, vfio-pci) or nfqueue" in text
    assert items["CPU"]["facts"] == {"cores": 2, "isa": "x86-64-v3"}
    assert text.endswith("this machine makes a gateway\n")


def test_without_an_iommu_dpdk_goes_by_uio(box: Box) -> None:
    status, items, _ = box.run()
    assert status == 0
    assert "uio_pci_generic" in items["NIC ens1"]["text"]


def test_secure_boot_without_an_iommu_refuses_dpdk_and_offers_nfqueue(box: Box) -> None:
    box.secure_boot()
    status, items, text = box.run()
    assert status == 1
    assert items["NIC ens1"]["facts"]["paths"] == ["nfqueue"]
    assert "path: dpdk is refused: no IOMMU, and the kernel is locked down (Secure Boot)" in text
    assert "use path: nfqueue" in items["NIC ens1"]["text"]


def test_secure_boot_with_an_iommu_takes_nothing_away(box: Box) -> None:
    box.secure_boot()
    box.iommu((MANAGEMENT,), (DATA,))
    status, items, _ = box.run()
    assert status == 0
    assert "Secure Boot is on, lockdown: integrity" in items["firmware"]["text"]


def test_the_management_nic_is_never_offered_to_dpdk(box: Box) -> None:
    _, items, _ = box.run()
    assert items["NIC eno1"]["facts"]["paths"] == ["nfqueue"]
    assert "never path: dpdk" in items["NIC eno1"]["text"]


def test_the_nic_of_the_default_route_is_taken_for_the_management_one(box: Box) -> None:
    box.write(
        "proc/net/route", "Iface Dest Gw Fl R U M Mask\nens1 00000000 010200C0 3 0 0 0 00000000 0 0 0\n"
    )
    argv = [str(PREFLIGHT), "--root", str(box.top)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, env={"PATH": "/usr/bin:/nowhere"})
    assert "NIC ens1: ice; stays the kernel's" in done.stdout


def test_a_nic_that_shares_its_iommu_group_is_refused_with_the_neighbours_name(box: Box) -> None:
    box.iommu((MANAGEMENT,), (DATA, "0000:00:1f.2"))
    _, items, _ = box.run()
    assert "IOMMU group 1 also holds 0000:00:1f.2" in items["NIC ens1"]["text"]


def test_a_nic_that_dpdk_does_not_know_stays_on_the_kernels_path(box: Box) -> None:
    box.nic("wlan0", "0000:00:05.0", "iwlwifi")
    (box.top / "sys/devices/pci0000:00/0000:00:05.0/device").write_text("0x2723\n")
    status, items, _ = box.run()
    assert status == 1
    assert items["NIC wlan0"]["facts"]["paths"] == ["nfqueue"]
    assert "the image has no DPDK driver for it (8086:2723)" in items["NIC wlan0"]["text"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("proc/cpuinfo", "processor : 0\nflags : lm\n", "DPDK needs SSE4.2"),
        ("proc/meminfo", "MemTotal: 500000 kB\n", "the image needs 1000"),
        ("sys/class/block/sda/size", "2000", "no disk of 2.5 GB or more"),
    ],
)
def test_what_makes_a_gateway_impossible_is_refused_with_status_three(
    box: Box, name: str, text: str, said: str
) -> None:
    box.write(name, text)
    status, _, shown = box.run()
    assert status == 3
    assert said in shown
    assert shown.endswith("this machine does not make a gateway\n")


def test_it_runs_on_this_very_machine_and_says_something_of_each_part() -> None:
    done = subprocess.run([str(PREFLIGHT), "--json"], capture_output=True, text=True, timeout=60)
    assert done.returncode in (0, 1, 3)
    whats = {item["what"] for item in json.loads(done.stdout)["items"]}
    assert {"CPU", "memory", "disk", "firmware", "IOMMU"} <= whats


def test_a_wrong_option_is_a_usage_error() -> None:
    assert subprocess.run([str(PREFLIGHT), "--dance"], capture_output=True).returncode == 2
