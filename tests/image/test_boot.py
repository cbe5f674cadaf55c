"""The machine that boots images: what it makes of a console, and of a host whose KVM does not work."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from image import boot, kvm, qemu
from image.identity import Identity, make_identity


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> boot.Machine:
    """A machine whose QEMU is a `sleep`, and whose console the test writes."""
    monkeypatch.setattr(boot, "LOOK_S", 0.05)
    one = boot.Machine(tmp_path / "image.raw", tmp_path / "gw1")
    one.folder.mkdir()
    one.serial.write_text("")
    return one


@pytest.fixture
def guest(machine: boot.Machine) -> Iterator[socket.socket]:
    """The guest's end of the ready port of a machine that is booting."""
    machine._ready, theirs = socket.socketpair()
    machine._process = subprocess.Popen(["sleep", "60"])
    machine.started = time.monotonic()
    (machine.folder / "qemu.log").write_text("")
    with theirs, machine._ready:
        yield theirs
        machine._process.kill()
        machine._process.wait()


@pytest.mark.parametrize(
    "line",
    [
        "Kernel panic - not syncing: Attempted to kill init!",
        "You are in emergency mode. After logging in, type",
        "\x1b[0;1;31m[FAILED]\x1b[0m Failed to start dsnatd.service - dsnat engine.",
        "device-mapper: verity: 254:0: data block 7 is corrupted",
    ],
)
def test_a_hopeless_console_fails_at_once_and_is_quoted(
    machine: boot.Machine, guest: socket.socket, line: str
) -> None:
    machine.serial.write_text(f"all was well\n{line}\n")
    with pytest.raises(qemu.BootError, match="the console says") as caught:
        machine.wait_ready(deadline_s=20)
    assert line[-20:] in str(caught.value)
    assert str(machine.serial) in str(caught.value)


def test_an_emulated_cpu_that_ran_old_code_is_started_again_once(
    machine: boot.Machine, guest: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    panic = (
        "Oops: int3: 0000 [#1] PREEMPT SMP NOPTI\nRIP: 0010:sched_clock_cpu+0x9\nKernel panic - not syncing\n"
    )
    asked: list[str] = []

    def qmp(command: str, **_: object) -> None:
        asked.append(command)

    def look() -> str:
        asked.append("look")
        return panic * (1 if asked.count("look") < 4 else 2)  # once more, a while after the restart

    monkeypatch.setattr(boot, "kvm_works", lambda: False)
    monkeypatch.setattr(machine, "qmp", qmp)
    monkeypatch.setattr(machine, "console", look)
    with pytest.raises(qemu.BootError, match="the console says: Kernel panic"):
        machine.wait_ready(deadline_s=20)
    assert [word for word in asked if word != "look"] == ["set-action", "system_reset"]


def test_silence_is_a_failure_that_shows_the_last_lines(machine: boot.Machine, guest: socket.socket) -> None:
    machine.serial.write_text("one line\n")
    with pytest.raises(qemu.BootError, match="nothing on the console for 1 s") as caught:
        machine.wait_ready(silence_s=1, deadline_s=60)
    assert "one line" in str(caught.value)


def test_a_guest_that_is_up_but_not_well_says_why(machine: boot.Machine, guest: socket.socket) -> None:
    report = {"ready": False, "reason": "dsnatd.service is failed"}
    guest.sendall(json.dumps(report).encode() + b"\n")
    with pytest.raises(qemu.BootError, match=r"up but not well: dsnatd\.service is failed"):
        machine.wait_ready(deadline_s=20)


def test_only_the_guests_own_word_counts_as_ready(machine: boot.Machine, guest: socket.socket) -> None:
    machine.serial.write_text("Debian GNU/Linux 13 gateway ttyS0\n\ngateway login: ")
    with pytest.raises(qemu.BootError, match="nothing on the console"):
        machine.wait_ready(silence_s=0.5, deadline_s=20)
    guest.sendall(b'{"ready": true, "hostname": "gw1"}\n')
    assert machine.wait_ready(deadline_s=20).report["hostname"] == "gw1"


def test_a_qemu_that_dies_is_noticed_and_its_last_word_shown(
    machine: boot.Machine, guest: socket.socket
) -> None:
    (machine.folder / "qemu.log").write_text("qemu: could not open disk\n")
    assert machine._process is not None
    machine._process.kill()
    with pytest.raises(qemu.BootError, match=r"QEMU ended with status -9: qemu: could not open disk"):
        machine.wait_ready(deadline_s=20)


def test_a_kvm_that_hangs_costs_its_deadline_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "qemu"
    program.write_text(f"#!/bin/sh\necho x >> {tmp_path}/started\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(kvm, "QEMU", str(program))
    monkeypatch.setattr(os, "access", lambda path, mode: True)
    monkeypatch.setattr(kvm, "KVM_S", 0.5)
    memory = tmp_path / "kvm.json"
    before = time.monotonic()
    assert not kvm.kvm_works(memory)
    assert time.monotonic() - before < 15, "the machine's own 60 s were waited for"
    assert not kvm.kvm_works(memory)
    assert (tmp_path / "started").read_text() == "x\n", "the verdict is remembered"


def test_a_missing_image_and_missing_tools_are_said_with_the_command_that_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(qemu.NeedsError, match="run `make image` first"):
        qemu.check_needs(tmp_path / "nothing.raw", firmware=False)
    monkeypatch.setattr(shutil, "which", lambda program: None)
    with pytest.raises(qemu.NeedsError, match=r"apt-get install -y .*qemu-system-x86"):
        qemu.check_needs(tmp_path / "nothing.raw", firmware=False)


def test_the_command_line_is_read_out_of_the_unified_kernel_image(tmp_path: Path) -> None:
    text = b"roothash=abc console=ttyS0"
    image = bytearray(0x40 + 24 + 40)
    struct.pack_into("<I", image, 0x3C, 0x40)
    struct.pack_into("<H", image, 0x40 + 6, 1)  # one section
    struct.pack_into("<H", image, 0x40 + 20, 0)  # no optional header
    struct.pack_into("<8sIIII", image, 0x40 + 24, b".cmdline", len(text), 0, 512, len(image))
    (tmp_path / "x.efi").write_bytes(bytes(image) + text)
    assert qemu.kernel_command_line(tmp_path / "x.efi") == "roothash=abc console=ttyS0"


def test_the_command_that_repeats_a_boot_can_be_pasted_into_a_shell() -> None:
    assert qemu.quoted("a=b,c") == "a=b,c"
    assert qemu.quoted("it's") == "'it'\\''s'"


def test_a_host_key_stands_in_no_list_of_processes(machine: boot.Machine) -> None:
    machine.identity = make_identity("gw1", "ssh-ed25519 AAAA me", management=boot.MANAGEMENT_MAC)
    credentials = machine.identity.credentials()
    command = qemu.credentials(machine)
    assert not any(
        base64.b64encode(text.encode()).decode() in " ".join(command) for text in credentials.values()
    )
    paths = [Path(word.removeprefix("type=11,path=")) for word in command if word != "-smbios"]
    found = {}
    for path in paths:
        name, _, encoded = path.read_text().removeprefix("io.systemd.credential.binary:").partition("=")
        found[name] = base64.b64decode(encoded, validate=True).decode()
        assert path.stat().st_mode & 0o777 == 0o600
    assert found == credentials


def test_an_identity_names_the_host_key_before_the_gateway_exists() -> None:
    one = make_identity("gw1", "ssh-ed25519 AAAA me", management="52:54:00:d5:00:02", address="192.0.2.7/24")
    assert one.known_hosts("127.0.0.1", 2222).startswith("[127.0.0.1]:2222 ssh-ed25519 AAAA")
    credentials = one.credentials()
    assert credentials["system.hostname"] == "gw1"
    assert "Name=mgmt0" in credentials["network.link.10-management"]
    assert "Address=192.0.2.7/24" in credentials["network.network.10-management"]
    assert "OPENSSH PRIVATE KEY" in credentials["dsnat.ssh_host_ed25519_key"]


def test_management_by_dhcp_never_becomes_the_way_out_for_traffic() -> None:
    one = Identity("gw1", "", "ssh-ed25519 AAAA", "", "52:54:00:d5:00:02")
    assert "RouteMetric=4096" in one.credentials()["network.network.10-management"]


def test_a_folder_that_cannot_be_made_and_a_machine_without_memory_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert boot.main(["--folder", str(tmp_path / "file/x")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit, match="2"):
        boot.main(["--memory", "-5"])
    assert "'-5' is not a whole number above 0" in capsys.readouterr().err
