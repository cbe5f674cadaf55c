"""`make demo` on a machine that has everything, on one that lacks something, and when somebody stops it."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.lab import run, wait_until
from tests.system import demo

ROOT = Path(__file__).resolve().parents[2]
DEMO = [sys.executable, "-m", "tests.system.demo"]


def left_behind(pid: int) -> list[str]:
    """Namespaces and processes that a demo with this process id made and did not end."""
    spaces = [line for line in run(["ip", "netns", "list"]).splitlines() if line.startswith(f"dsnat-{pid}-")]
    folder = str(demo.LOGS)
    running = [
        line
        for line in run(["ps", "-eo", "pid=,args="]).splitlines()
        if folder in line and "ps -eo" not in line and f" {os.getpid()} " not in line
    ]
    return spaces + running


@pytest.mark.image
def test_the_whole_job_ends_with_every_line_right() -> None:
    with subprocess.Popen(
        DEMO, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        text, _ = process.communicate()
    (ROOT / ".build/demo-test.log").write_text(text)
    assert process.returncode == 0, text[-6000:]
    assert "10 + 10 + 10 + 10" in text
    assert "laddr_g1" in text.partition("$ dsnatctl show pools")[2]
    assert left_behind(process.pid) == []


@pytest.mark.image
def test_a_demo_that_is_stopped_takes_everything_with_it(tmp_path: Path) -> None:
    log = tmp_path / "demo.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(DEMO, cwd=ROOT, stdout=sink, stderr=subprocess.STDOUT)

    def booting() -> bool:
        assert process.poll() is None, log.read_text()
        return "console:" in log.read_text()

    wait_until("the demo to boot the gateway", booting, deadline_s=600)
    assert left_behind(process.pid) != []
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == demo.INTERRUPTED, log.read_text()
    assert left_behind(process.pid) == []


def test_without_root_the_demo_says_what_to_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert demo.main([]) == demo.LACKING
    assert "run `sudo make demo`" in capsys.readouterr().err


def test_a_missing_tool_is_named_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "iperf3" else f"/usr/bin/{name}")
    assert demo.main([]) == demo.LACKING
    assert "iperf3 not found; run `make setup`" in capsys.readouterr().err


def test_a_full_disk_is_noticed_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12, 10**6))
    assert demo.main([]) == demo.LACKING
    assert "GiB free" in capsys.readouterr().err


def test_a_second_demo_in_one_checkout_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(demo, "check_needs", lambda: None)
    monkeypatch.setattr(demo, "LOCK", tmp_path / "demo.lock")
    with ExitStack() as first:
        demo.take_lock(first)
        assert demo.main([]) == demo.LACKING
    assert "another demo runs in this checkout" in capsys.readouterr().err


def test_a_disk_that_fills_up_on_the_way_is_a_sentence_and_not_a_broken_promise(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(demo, "check_needs", lambda: None)
    monkeypatch.setattr(demo, "LOCK", tmp_path / "demo.lock")
    monkeypatch.setattr(demo, "LOGS", tmp_path / "demo")
    monkeypatch.setattr(demo, "demo", full)
    assert demo.main([]) == demo.LAB_FAILED
    assert "No space left on device" in capsys.readouterr().err


def test_a_build_ends_with_the_demo_that_started_it_and_so_does_what_the_build_started(
    tmp_path: Path,
) -> None:
    pid_file, cleaned = tmp_path / "pid", tmp_path / "cleaned"
    child = tmp_path / "child.sh"  # takes its time to clean up
    child.write_text(
        f"trap 'sleep 1; echo yes > {cleaned}; exit 1' INT; echo $$ > {pid_file}; while :; do sleep 1; done"
    )
    script = (
        "import pathlib, signal; from tests.system import demo\n"
        "signal.signal(signal.SIGTERM, demo.interrupt)\n"
        f"build = ['sh', '-c', 'sh {child}; echo end']\n"
        f"demo.program(build, pathlib.Path('{tmp_path}/log'), status=4, stages=demo.Stages(total=1))\n"
    )
    argv = [sys.executable, "-c", script]
    with subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        text = wait_until("the build to start", lambda: pid_file.exists() and pid_file.read_text().strip())
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) != 0
    assert cleaned.exists()
    assert not Path("/proc", str(text)).exists()
