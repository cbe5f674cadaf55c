"""Does KVM work here? /dev/kvm may exist, open and answer, and the first instruction hang: such hosts share
page tables with a hypervisor of their own. So something tiny is booted with it, at most once for a kernel
and a QEMU, and the verdict is kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from image.build import BUILD
from image.qemu import QEMU

KVM_S = 5.0  # a working KVM needs far less for seven instructions


def kvm_works(memory: Path = BUILD / "kvm.json") -> bool:
    """Boots seven instructions with KVM, unless the verdict is known."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    qemu = shutil.which(QEMU)
    if qemu is None:
        return False
    key = f"{os.uname().release} {Path(qemu).stat().st_mtime_ns}"
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(memory.read_text())
        if known["key"] == key:
            return bool(known["works"])
    # mov al,42; out 0xf4,al; hlt; jmp back. The debug device makes QEMU exit with 2 * 42 + 1.
    sector = bytes.fromhex("b02ae6f4f4ebfd").ljust(510, b"\0") + b"\x55\xaa"
    with tempfile.NamedTemporaryFile(prefix="dsnat-kvm-") as disk:
        disk.write(sector)
        disk.flush()
        command = [
            QEMU,
            "-accel",
            "kvm",
            "-cpu",
            "host",
            "-m",
            "32",
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-device",
            "isa-debug-exit,iobase=0xf4",
            "-drive",
            f"file={disk.name},format=raw,readonly=on",
        ]
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as vm:
            try:
                works = vm.wait(KVM_S) == 85
            except subprocess.TimeoutExpired:
                vm.kill()
                works = False
    memory.parent.mkdir(parents=True, exist_ok=True)
    memory.write_text(json.dumps({"key": key, "works": works}) + "\n")
    return works
