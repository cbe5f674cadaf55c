"""A gateway's life with two slots: flashed, updated, its update broken, gone back, reset (--scenarios).

One disk (a loop device) lives through all of it, in the order of the tests, and every start goes through
firmware and boot loader. 0.1.1 is flashed, 0.1.2 is the update, both signed with throw-away keys. On 0.1.2
the engine does not start while the file /var/lib/dsnat/break-it is there (a drop-in by credential): an
update that looks whole and is not well.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from image.boot import MANAGEMENT_MAC, Machine, Nic, one_boot_at_a_time
from image.build import BUILD, build, tool
from image.flash import esp_offset
from image.identity import Identity
from image.keys import Keys, make_keys
from image.qemu import BootError
from tests.image.conftest import PATIENT, drop_in, wired
from tests.lab import Netns, new_lab, run, wait_until
from tests.provision.test_sshd import FLEET

pytestmark = [pytest.mark.image, pytest.mark.scenario]

ROOT = Path(__file__).resolve().parents[2]
OLD, NEW = "0.1.1", "0.1.2"
PATIENCE_S = 2400
DROP_INS = PATIENT | {
    "dsnatd.service": "[Service]\nExecStartPre=/bin/sh -c '! { [ -e /var/lib/dsnat/break-it ] "
    f"&& grep -q ^IMAGE_VERSION=.*{NEW} /usr/lib/os-release; }}'\n",
}
VERSION = ". /usr/lib/os-release; echo $IMAGE_VERSION"


class Gateway:
    """The flashed disk, and the machine that it is in at the moment."""

    def __init__(self, folder: Path, disk: Path, nics: list[Nic], key: Path) -> None:
        self.folder, self.disk, self.nics, self.key = folder, disk, nics, key
        self.fleet = folder / "fleet.yaml"
        self.starts = 0
        self.machine: Machine

    def start(self, undo: ExitStack) -> str:
        self.starts += 1
        extra = [word for unit, text in DROP_INS.items() for word in drop_in(unit, text)]
        self.machine = Machine(
            self.disk,
            self.folder / f"start-{self.starts}",
            nics=self.nics,
            disk=self.disk,
            reboot=True,
            extra=extra,
        )
        undo.callback(self.machine.stop)
        with one_boot_at_a_time():
            self.machine.start()
            port, text = self.machine.ssh_port, self.fleet.read_text()
            key = text.split("host_key: ")[1].split("\n")[0].strip().strip("'\"")
            self.machine.identity = Identity("gw1", "", key, "", MANAGEMENT_MAC)
            lines = [
                line if not line.strip().startswith("management:") else self._management(port)
                for line in text.splitlines()
            ]
            self.fleet.write_text("\n".join([*lines, ""]))
            return str(self.machine.wait_ready(silence_s=300).report["version"])

    @staticmethod
    def _management(port: int) -> str:
        return f"    management: {{address: 127.0.0.1, port: {port}}}"

    def next_start(self, wanted: str) -> list[str]:
        """Waits for the next start of `wanted`, and says what came up before it and was not well."""
        others = []
        while True:
            try:
                version = self.machine.wait_ready(silence_s=600, deadline_s=PATIENCE_S, forgive=True).report[
                    "version"
                ]
            except BootError as error:
                if "up but not well" not in str(error):
                    raise
                others.append("unwell")
                continue
            if version == wanted:
                return others
            others.append(str(version))

    def __call__(self, script: str, *, check: bool = True, timeout_s: float = 600) -> str:
        done = self.machine.ssh(self.key, script, timeout_s=timeout_s)
        assert not check or done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def dsnat_fleet(self, *words: str, status: int = 0) -> str:
        argv = [sys.executable, "-m", "provision", "--file", str(self.fleet), *words]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        assert done.returncode == status, f"{done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def good(self) -> bool:
        return "good" in self("/usr/lib/systemd/systemd-bless-boot status", check=False)

    def translates(self, client: Netns) -> None:
        def answers() -> bool:
            said = client.run("ping", "-n", "-c", "1", "-W", "1", "198.51.100.10", check=False)
            return "1 received" in said

        wait_until("a ping through the gateway", answers, deadline_s=120)


@pytest.fixture(scope="module")
def images() -> dict[str, Path]:
    folder = BUILD / "throw-away"
    keys = Keys(folder) if folder.exists() else make_keys(folder)
    return {version: build(version=version, keys=keys) for version in (OLD, NEW)}


@pytest.fixture(scope="module")
def place(
    images: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Gateway, Netns, Netns, ExitStack]]:
    folder = tmp_path_factory.mktemp("life")
    with new_lab(folder / "lab") as lab, ExitStack() as undo:
        client, server, nics = wired(lab)
        key = folder / "operator"
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)])
        file = folder / "disk"
        file.touch()
        os.truncate(file, 4 << 30)
        disk = Path(run(["losetup", "-f", "--show", str(file)]).strip())
        undo.callback(run, ["losetup", "-d", str(disk)], check=False)
        gateway = Gateway(folder, disk, nics, key)
        gateway.fleet.write_text(
            FLEET.format(
                user="root",
                identity=key,
                window=120,
                pool="203.0.113.1-203.0.113.4",
                port=1,
                host_key=f"ssh-ed25519 {'A' * 68}",
            )
        )
        argv = [sys.executable, "-m", "image.flash", str(disk), "--image", f"{images[OLD]}.zst"]
        argv += ["--confirm", disk.name[-4:], "--gateway", "gw1", "--fleet", str(gateway.fleet)]
        argv += ["--authorized-keys", f"{key}.pub", "--management-mac", MANAGEMENT_MAC]
        print(run(argv, timeout_s=600))
        # A VM's firmware would take our certificate from the ESP and lock the kernel down: no uio, and no
        # DPDK without an IOMMU. That is another test's.
        esp = f"{disk}@@{esp_offset(disk)}"
        run(tool("mdeltree", "-i", esp, "::/loader/keys"))
        machines = undo.enter_context(ExitStack())
        yield gateway, client, server, machines


Place = tuple[Gateway, Netns, Netns, ExitStack]


def entries(gateway: Gateway) -> set[str]:
    return set(gateway("ls $(bootctl -x)/EFI/Linux").split())


def test_a_flashed_gateway_boots_and_is_configured(place: Place) -> None:
    gateway, client, _, machines = place
    assert gateway.start(machines) == OLD
    print(f"ready after {time.monotonic() - gateway.machine.started:.0f} s")
    print(gateway.dsnat_fleet("push", "--yes"))
    gateway.translates(client)
    assert "updates must be signed" in gateway("dsnat-image status")
    gateway("echo canary > /var/lib/canary")


def test_an_update_that_nobody_we_know_signed_is_refused(place: Place, images: dict[str, Path]) -> None:
    gateway, *_ = place
    uki = images[NEW].with_suffix(".efi")
    gateway("mkdir -p /var/elsewhere")
    with uki.open("rb") as file:
        subprocess.run(
            gateway.machine.ssh_command(gateway.key, f"cat > /var/elsewhere/{uki.name}"),
            stdin=file,
            check=True,
        )
    gateway("cd /var/elsewhere && sha256sum * > SHA256SUMS && echo x > SHA256SUMS.gpg")
    said = gateway("dsnat-image update --from /var/elsewhere; echo status $?; rm -r /var/elsewhere")
    assert "is not signed by a key that this image knows" in said
    assert "status 3" in said
    assert entries(gateway) == {f"gateway_{OLD}.efi"}


def send(gateway: Gateway, images: dict[str, Path]) -> None:
    """As the agent's `receive` would leave it."""
    folder = images[NEW].parent
    names = [path.name for path in folder.glob("gateway_*.root-*.gz")]
    names += [f"gateway_{NEW}.efi", "SHA256SUMS", "SHA256SUMS.gpg"]
    tar = subprocess.run(["tar", "-C", str(folder), "-c", *names], stdout=subprocess.PIPE, check=True).stdout
    subprocess.run(
        gateway.machine.ssh_command(gateway.key, "mkdir -p /var/updates && tar -x -C /var/updates"),
        input=tar,
        check=True,
    )


def test_an_update_by_the_fleet_tool_is_booted_and_blessed(place: Place, images: dict[str, Path]) -> None:
    gateway, client, *_ = place
    print(gateway.dsnat_fleet("update", str(images[NEW].parent), "--yes"))
    assert gateway.next_start(NEW) == []
    wait_until("the new version to count as good", gateway.good, deadline_s=300)
    assert entries(gateway) == {f"gateway_{OLD}.efi", f"gateway_{NEW}.efi"}
    assert gateway("cat /var/lib/canary").strip() == "canary"
    gateway.translates(client)
    print(gateway("dsnat-image status"))


def test_one_command_goes_back(place: Place) -> None:
    gateway, client, *_ = place
    print(gateway("dsnat-image rollback", check=False))
    assert gateway.next_start(OLD) == []
    assert gateway(VERSION).strip() == OLD
    status = gateway("dsnat-image status")
    print(status)
    assert f"{NEW}                failed, not tried any more" in status
    gateway.translates(client)


def test_an_update_that_is_not_well_is_left_after_three_tries(place: Place, images: dict[str, Path]) -> None:
    gateway, client, *_ = place
    gateway("touch /var/lib/dsnat/break-it")
    said = gateway.dsnat_fleet("update", str(images[NEW].parent), "--yes", status=6)
    print(said)
    assert f"went back to image {OLD} by itself" in said
    console = gateway.machine.console()
    assert console.count(f"version {NEW} is on trial; restarting") == 3
    assert gateway(VERSION).strip() == OLD
    gateway.translates(client)
    gateway("rm /var/lib/dsnat/break-it")
    gateway.next_start(OLD)


def test_a_slot_with_damaged_blocks_does_not_run_and_is_left(place: Place, images: dict[str, Path]) -> None:
    """The update comes from an HTTP server this time, through the gateway's own outside port."""
    gateway, client, server, _ = place
    folder = images[NEW].parent
    program = server.start(
        *(sys.executable, "-m", "http.server", "8000", "--directory", str(folder)), log="http.log"
    )
    server.wait_for_listener(program, 8000)
    print(gateway(f"dsnat-image update {NEW} --from http://198.51.100.10:8000", timeout_s=1200))
    part = gateway(f"readlink -f /dev/disk/by-partlabel/gateway_{NEW}").strip()
    parts = gateway("lsblk -rno PATH,PARTLABEL,SIZE").splitlines()
    part = next(line.split()[0] for line in parts if f"gateway_{NEW} 512M" in line)
    # every 64th block: whatever is read first meets one
    gateway(
        f"for i in $(seq 2 64 28000); do dd if=/dev/urandom of={part} bs=4096 seek=$i count=1 conv=notrunc "
        "status=none; done; sync",
        timeout_s=1200,
    )
    gateway("systemctl reboot", check=False)
    others = gateway.next_start(OLD)
    assert others == []
    console = gateway.machine.console()
    print([line for line in console.splitlines() if "verity" in line][-4:])
    assert "verity" in console
    assert gateway(VERSION).strip() == OLD
    gateway.translates(client)


def test_a_power_cut_while_a_slot_is_written_and_a_change_waits_undoes_both(
    place: Place, images: dict[str, Path]
) -> None:
    gateway, client, _, machines = place
    send(gateway, images)
    wanted = gateway.fleet.read_text()
    gateway.fleet.write_text(wanted.replace("203.0.113.1-203.0.113.4", "203.0.113.8-203.0.113.9"))
    before = gateway("readlink /var/lib/dsnat/generations/current")
    print(gateway.dsnat_fleet("push", "--yes", "--no-confirm", "--window", "3600"))
    assert "203.0.113.8" in gateway("cat /etc/dsnat/dsnatd.yaml")
    gateway("systemd-run --unit=cut dsnat-image update")

    def writing() -> bool:
        return "systemd-pull" in gateway("ps ax", check=False) or "systemd-import" in gateway("ps ax")

    wait_until("the slot to be written", writing, deadline_s=120)
    gateway.machine._process.kill()  # type: ignore[union-attr]
    gateway.machine.stop()
    gateway.fleet.write_text(wanted)
    assert gateway.start(machines) == OLD
    gateway.translates(client)
    assert entries(gateway) == {f"gateway_{OLD}.efi"}
    assert gateway("readlink /var/lib/dsnat/generations/current") == before
    assert "203.0.113.8" not in gateway("cat /etc/dsnat/dsnatd.yaml")
    gateway("rm -rf /var/updates")


def test_a_factory_reset_leaves_the_identity_and_nothing_else(place: Place) -> None:
    gateway, *_ = place
    gateway("dsnat-image factory-reset --yes", check=False)
    assert gateway.next_start(OLD) == []
    report: dict[str, Any] = json.loads(gateway("/usr/lib/dsnat/ready /run/report; cat /run/report"))
    assert report["engine"] == "no configuration yet"
    assert "No such file" in gateway("cat /var/lib/canary", check=False)
    assert gateway("readlink /var/lib/dsnat/generations/current").strip() == "0"
    assert gateway("hostname").strip() == "gw1"
    log = BUILD / "image-life.log"
    shutil.copyfile(gateway.machine.serial, log)
