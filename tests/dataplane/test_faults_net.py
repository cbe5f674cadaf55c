"""What must not happen and does: a worker that hangs, too little memory, somebody who may not ask."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import dsnatctl
from tests.gateway import Gateway, config, new_gateway, ping
from tests.lab import Lab, wait_until
from tests.traffic import SERVER

pytestmark = pytest.mark.net

PTRACE_ATTACH, PTRACE_DETACH = 16, 17
WALL = 0x40000000  # __WALL: a thread is no child


def worker_thread(pid: int, path: str) -> int:
    """The thread that translates: by its name."""
    wanted = "dsnat-queue" if path == "nfqueue" else r"rte-worker-\d+|lcore-worker-\d+|dpdk-worker\d*"
    for task in Path(f"/proc/{pid}/task").iterdir():
        if re.fullmatch(wanted, (task / "comm").read_text().strip()):
            return int(task.name)
    names = {(task / "comm").read_text().strip() for task in Path(f"/proc/{pid}/task").iterdir()}
    raise AssertionError(f"no worker thread among {names}")


@contextmanager
def stopped(thread: int) -> Iterator[None]:
    """One thread of a process stands still, the others go on: what a hanging device looks like."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    assert libc.ptrace(PTRACE_ATTACH, thread, None, None) == 0, os.strerror(ctypes.get_errno())
    os.waitpid(thread, WALL)
    try:
        yield
    finally:
        if libc.ptrace(PTRACE_DETACH, thread, None, None):  # it is dead: its process ends when we have looked
            os.waitpid(thread, WALL)


@pytest.mark.parametrize("path", ["dpdk", "nfqueue"])
def test_a_worker_that_hangs_ends_the_daemon_and_the_next_goes_on_with_the_sessions(
    lab: Lab, program: Callable[[str], Path], path: str
) -> None:
    gateway = new_gateway(lab, program("dsnatd"), path=path, start=False)
    sessions = Path("/dev/shm", f"{lab.prefix}.sessions")
    lab.undo.callback(sessions.unlink, missing_ok=True)
    notify = Path("/tmp", f"{lab.prefix}.notify")
    heard = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    heard.bind(str(notify))
    heard.settimeout(20)
    lab.undo.callback(notify.unlink)
    lab.undo.callback(heard.close)
    environment = {"NOTIFY_SOCKET": str(notify), "WATCHDOG_USEC": "20000000"}
    gateway.start("--sessions", str(sessions), env=environment)
    gateway.address()
    assert " 3 received" in ping(gateway.client, SERVER, "-e", "4711")
    while b"WATCHDOG=1" not in heard.recv(4096):
        pass
    before = gateway.show("sessions")["sessions"]

    with stopped(worker_thread(gateway.pid(), path)):
        wait_until("the daemon to notice", lambda: "makes no rounds" in gateway.daemon.text())
        heard.setblocking(False)
        try:
            while True:
                heard.recv(4096)
        except BlockingIOError:
            pass
        wait_until("the daemon's end", lambda: not gateway.daemon.running or zombie(gateway), deadline_s=60)
    assert gateway.daemon.wait(timeout_s=20) == -signal.SIGABRT
    with pytest.raises(BlockingIOError):
        heard.recv(4096)  # systemd has heard nothing more
    assert "has made no round for 10 s" in gateway.daemon.text()

    gateway.start("--sessions", str(sessions))
    assert " 3 received" in ping(gateway.client, SERVER, "-e", "4711")
    assert [one["outside"] for one in gateway.show("sessions")["sessions"]] == [
        one["outside"] for one in before
    ]
    gateway.close()


def zombie(gateway: Gateway) -> bool:
    """SIGABRT is on its way, but the traced thread has to be let go first."""
    return "has made no round" in gateway.daemon.text()


def test_too_little_memory_is_said_with_the_figure_and_what_would_fit(
    program: Callable[[str], Path], tmp_path: Path
) -> None:
    file, control = tmp_path / "dsnatd.yaml", tmp_path / "s"
    file.write_text(config(sessions=1_000_000_000))
    argv = [str(program("dsnatd")), "--config", str(file), "--socket", str(control), "--no-huge"]

    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 4, done.stderr
    said = re.search(
        r"max_sessions: 1000000000 needs (\d+) MB in all, (\d+) MB are free: about (\d+) would fit",
        done.stderr,
    )
    assert said, done.stderr
    needs, there, fits = map(int, said.groups())
    assert needs > 60_000
    assert fits / 1_000_000_000 == pytest.approx(0.9 * there / needs, rel=0.01)
    assert not control.exists()


def test_members_of_the_group_may_ask_and_others_are_told_what_to_do(
    lab: Lab, program: Callable[[str], Path]
) -> None:
    gateway = new_gateway(lab, program("dsnatd"), path="nfqueue", start=False)
    gateway.start(env={"DSNATD_GROUP": "daemon"})
    root = str(Path(dsnatctl.__file__).parents[1])

    def ask(*groups: str) -> subprocess.CompletedProcess[str]:
        code = (
            f"import sys; sys.path.insert(0, {root!r}); from dsnatctl.__main__ import main; sys.exit(main())"
        )
        who = ["setpriv", "--reuid", "65534", "--regid", "65534", *groups]
        argv = [*who, sys.executable, "-c", code, "status", "--socket", str(gateway.socket)]
        return subprocess.run(argv, capture_output=True, text=True, cwd="/", check=False)

    found = gateway.socket.stat()
    assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o660, 1)
    stranger = ask("--clear-groups")
    assert stranger.returncode != 0
    if "Permission" not in stranger.stderr:  # this Python can be run by anybody
        assert (stranger.returncode, "join the socket's group" in stranger.stderr) == (3, True), (
            stranger.stderr
        )
        assert ask("--groups", "1").returncode == 0
    gateway.close()
