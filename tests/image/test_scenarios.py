"""Boots that take minutes (--scenarios): NIC models, many queues, and what goes wrong in life."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from image.boot import MANAGEMENT_MAC, Machine, one_boot_at_a_time
from image.build import BUILD, build, ensure_tree, tool
from image.identity import make_identity
from image.keys import Keys, make_keys
from image.qemu import QEMU, BootError
from tests.image.conftest import CONFIG, INSIDE, OUTSIDE, PATIENT, Gateway, configure, drop_in, wired
from tests.lab import Netns, new_lab, run, wait_until

pytestmark = [pytest.mark.image, pytest.mark.scenario]

SILENCE_S = 600  # an emulated machine on a busy host


@contextmanager
def booted(
    image: Path,
    folder: Path,
    *,
    model: str = "virtio-net-pci",
    queues: int = 1,
    cpus: int = 2,
    iommu: bool = False,
    extra: tuple[str, ...] = (),
    **more: object,
) -> Iterator[Gateway]:
    key = folder / "id"
    run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)])
    identity = make_identity("gw1", key.with_suffix(".pub").read_text(), management=MANAGEMENT_MAC)
    with new_lab(folder / "lab") as lab, ExitStack() as undo:
        client, server, nics = wired(lab, model=model, queues=queues)
        machine = Machine(
            image,
            folder / "gw1",
            identity,
            nics,
            cpus=cpus,
            iommu=iommu,
            reboot=True,
            extra=[*extra, *(word for unit, text in PATIENT.items() for word in drop_in(unit, text))],
            **more,  # type: ignore[arg-type]
        )
        undo.callback(machine.stop)
        with one_boot_at_a_time():
            machine.start()
            ready = machine.wait_ready(silence_s=SILENCE_S)
        yield Gateway(machine, ready, key, client, server)


def translates(client: Netns) -> None:
    def answers() -> bool:
        return "1 received" in client.run("ping", "-n", "-c", "1", "-W", "1", "198.51.100.10", check=False)

    wait_until("a ping through the gateway", answers, deadline_s=120)


def again(gateway: Gateway) -> str:
    """Restarts it, and gives what the console said from then on."""
    before = len(gateway.machine.console())
    gateway("systemctl reboot", check=False)
    gateway.machine.wait_ready(silence_s=SILENCE_S, forgive=True)
    return gateway.machine.console()[before:]


def qemu_for(model: str) -> list[str]:
    """The machine's own QEMU, or Debian 13's in a tree of its own: igb came with QEMU 8."""
    if model != "igb":
        return [QEMU]
    tree = BUILD / "qemu"
    ensure_tree(tree, ("qemu-system-x86",), BUILD / "qemu.log", holds="QEMU 10")
    return [*tool(QEMU, tree=tree), "-L", str(tree / "usr/share/qemu")]


@pytest.mark.parametrize("model", ["virtio-net-pci", "e1000e", "vmxnet3", "igb"])
def test_the_engine_drives_each_model_of_nic_and_forwards(built: Path, tmp_path: Path, model: str) -> None:
    with booted(built, tmp_path, model=model, qemu=qemu_for(model)) as gateway:
        outside = "0000:00:05.0" if model == "igb" else OUTSIDE  # see image/qemu.py
        configure(gateway, CONFIG.replace(OUTSIDE, outside))
        for device in (INSIDE, outside):
            driver = gateway(f"basename $(readlink /sys/bus/pci/devices/{device}/driver)").strip()
            assert driver == "uio_pci_generic"
        translates(gateway.client)
        log = gateway.server.start("iperf3", "-s", log="iperf3-server.log")
        gateway.server.wait_for_listener(log, 5201)
        answer = json.loads(
            gateway.client.run(
                *("iperf3", "-c", "198.51.100.10", "-u", "-b", "2M", "-t", "5", "--json"), timeout_s=60
            )
        )
        counters = json.loads(gateway("dsnatctl show counters --json"))
        lost, sent = answer["end"]["sum"]["lost_packets"], answer["end"]["sum"]["packets"]
        print(f"{model}: {counters['counters']['forwarded']} forwarded, {lost} of {sent} lost")
        print(gateway("dsnatctl show ports"))
        assert counters["equation"]
        assert counters["counters"]["forwarded"] > 500


def test_four_queues_on_the_kernels_path_are_spread_over_the_cores(built: Path, tmp_path: Path) -> None:
    with booted(built, tmp_path, queues=4, cpus=4) as gateway:
        nics = gateway("ls /sys/class/net | grep -v -e lo -e mgmt0").split()
        assert len(nics) == 2
        for nic in nics:
            features = gateway(f"ethtool -k {nic}")
            print(nic, *re.findall(r"^(?:generic|large)-receive-offload.*", features, re.MULTILINE), sep="\n")
            assert re.search(r"^generic-receive-offload: off", features, re.MULTILINE)
            assert not re.search(r"^large-receive-offload: on", features, re.MULTILINE)
            print(gateway(f"ethtool -l {nic} | tail -n 5"))
            assert len(gateway(f"ls -d /sys/class/net/{nic}/queues/rx-*").split()) == 4
            affinity = gateway(
                f"for i in $(ls /sys/class/net/{nic}/device/../msi_irqs | sort -n); do "
                "echo $i $(cat /proc/irq/$i/smp_affinity_list) $(ls /proc/irq/$i | grep virtio); done"
            )
            print(affinity)
            queues = [line.split() for line in affinity.splitlines() if "put" in line]
            assert len(queues) == 8
            assert all(name.endswith(f"put.{core}") for _, core, name in queues)
            xps = gateway(f"cat /sys/class/net/{nic}/queues/tx-*/xps_cpus").split()
            rps = gateway(f"cat /sys/class/net/{nic}/queues/rx-*/rps_cpus").split()
            print(xps, rps)
            assert [int(mask.replace(",", ""), 16) for mask in xps] == [1, 2, 4, 8]
            assert {int(mask.replace(",", ""), 16) for mask in rps} == {0}
        wrong = CONFIG.replace(INSIDE, "0000:00:02.0")
        said = gateway(
            f"cat > /run/wrong.yaml <<'X'\n{wrong}X\n"
            "DSNAT_CONFIG=/run/wrong.yaml /usr/lib/dsnat/nic start 2>&1",
            check=False,
        )
        print(said)
        assert "mgmt0 (0000:00:02.0) is not given to the engine: it is the management interface" in said
        assert gateway("hostname").strip() == "gw1", "SSH is still there"


def test_a_broken_configuration_and_a_full_var_end_in_a_reachable_gateway(
    built: Path, tmp_path: Path
) -> None:
    with booted(built, tmp_path) as gateway:
        configure(gateway)
        translates(gateway.client)
        gateway("dd if=/dev/zero of=/var/full bs=1M status=none || true; df -h /var | tail -n 1")
        console = again(gateway)
        assert "Failed to start" not in console
        translates(gateway.client)
        gateway("rm /var/full")

        gateway("echo 'pools: [' >> /var/lib/dsnat/generations/1/dsnatd.yaml")
        before = len(gateway.machine.console())
        with pytest.raises(BootError, match=r"up but not well: dsnatd\.service is"):
            again(gateway)
        console = gateway.machine.console()[before:]
        print(next(line for line in console.splitlines() if "dsnatd.yaml:" in line))
        assert gateway("nft list table inet dsnat_failclosed").count("policy drop") == 1
        assert gateway("systemctl is-active dsnatd", check=False).strip() in ("failed", "inactive")


@pytest.mark.parametrize("clock", ["1990-01-01T00:00:00", "2060-01-01T00:00:00"])
def test_a_clock_that_is_wrong_by_decades_does_not_matter(built: Path, tmp_path: Path, clock: str) -> None:
    with booted(built, tmp_path, extra=("-rtc", f"base={clock}")) as gateway:
        configure(gateway)
        translates(gateway.client)
        print(gateway("date; systemctl --failed --no-legend"))


def test_a_machine_without_any_nic_is_up_and_says_so_on_its_port(built: Path, tmp_path: Path) -> None:
    machine = Machine(built, tmp_path / "gw1", management=False)
    with one_boot_at_a_time(), machine:
        report = machine.wait_ready(silence_s=SILENCE_S).report
        assert report["ssh"] == "active"
        assert report["failed_units"] == []


def test_a_damaged_root_is_not_run(built: Path, tmp_path: Path) -> None:
    """Without another slot to go to: the machine stops with the reason on its console, again and again."""
    disk = tmp_path / "disk.raw"
    run(["cp", "--sparse=always", "--reflink=auto", str(built), str(disk)], timeout_s=300)
    table = json.loads(run(["sfdisk", "--json", str(disk)]))["partitiontable"]
    root = next(part for part in table["partitions"] if part.get("name", "").startswith("gateway_"))
    with disk.open("r+b") as file:
        for block in range(2, 28000, 64):
            file.seek(root["start"] * table["sectorsize"] + block * 4096)
            file.write(b"damaged!" * 512)
    machine = Machine(built, tmp_path / "gw1", disk=disk)
    with one_boot_at_a_time(), machine:
        wait_until(
            "the kernel to refuse the root",
            lambda: "Kernel panic - not syncing: dm-verity" in machine.console(),
            deadline_s=900,
        )


def test_under_secure_boot_the_signed_image_starts_and_dpdk_needs_the_iommu(tmp_path: Path) -> None:
    """The firmware begins in setup mode, takes our certificate from the ESP, and checks from then on."""
    folder = BUILD / "throw-away"
    keys = Keys(folder) if folder.exists() else make_keys(folder)
    image = build(version="0.1.1", keys=keys)
    with booted(image, tmp_path, iommu=True) as gateway:
        print(
            gateway("bootctl status 2>/dev/null | grep -i 'secure boot'; cat /sys/kernel/security/lockdown")
        )
        assert "Secure Boot: enabled" in gateway("bootctl status 2>/dev/null")
        assert "[none]" not in gateway("cat /sys/kernel/security/lockdown")
        configure(gateway)
        assert gateway(f"basename $(readlink /sys/bus/pci/devices/{INSIDE}/driver)").strip() == "vfio-pci"
        translates(gateway.client)
