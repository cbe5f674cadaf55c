"""The builder: when it builds, and what it says when it cannot."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from image import build
from tests.lab import wait_until


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny checkout, with a finished build of its present state."""
    (tmp_path / "image/mkosi.conf.d").mkdir(parents=True)
    (tmp_path / "dataplane/core").mkdir(parents=True)
    (tmp_path / "mkosi.conf").write_text("[Output]\nImageVersion=1.2.3\n")
    (tmp_path / "image/mkosi.conf.d/10.conf").write_text("[Content]\n")
    (tmp_path / "dataplane/core/a.c").write_text("int a;\n")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "BUILD", tmp_path / ".build")
    paths = build.Paths("cloud")
    paths.output.mkdir(parents=True)
    build.image_path().write_bytes(b"image")
    stamp = {"inputs": build.inputs_hash("cloud"), "files": ["gateway_1.2.3.raw"]}
    paths.stamp.write_text(json.dumps(stamp))
    return tmp_path


def current(profile: str = "cloud") -> bool:
    return build.up_to_date(build.Paths(profile), build.inputs_hash(profile))


def test_nothing_is_built_when_nothing_changed(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build.build() == checkout / ".build/image/gateway_1.2.3.raw"
    assert "is up to date" in capsys.readouterr().out


def test_a_changed_source_or_setting_or_execute_bit_is_a_reason_to_build(checkout: Path) -> None:
    assert current()
    source = checkout / "dataplane/core/a.c"
    for change in (
        lambda: source.write_text("int b;\n"),
        lambda: (checkout / "image/mkosi.conf.d/20.conf").write_text("[Content]\n"),
        lambda: source.chmod(0o755),
    ):
        before = build.inputs_hash("cloud")
        change()
        assert build.inputs_hash("cloud") != before


def test_tests_and_documents_are_no_reason_to_build(checkout: Path) -> None:
    (checkout / "dataplane/core/a_test.c").write_text("int t;\n")
    (checkout / "dataplane/README.md").write_text("words\n")
    (checkout / "dataplane/__pycache__").mkdir()
    (checkout / "dataplane/__pycache__/x.pyc").write_bytes(b"x")
    assert current()


def test_touching_a_file_is_no_reason_to_build(checkout: Path) -> None:
    os.utime(checkout / "dataplane/core/a.c", (1, 1))
    assert current()


def test_a_missing_result_is_a_reason_to_build(checkout: Path) -> None:
    build.image_path().unlink()
    assert not current()


def test_profiles_share_no_folder(checkout: Path) -> None:
    assert build.image_path("generic") != build.image_path("cloud")
    assert not current("generic")


def test_a_failed_command_shows_its_last_twenty_lines_and_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = "i=0; while [ $i -lt 100 ]; do i=$((i+1)); echo line $i; done; exit 100"
    with pytest.raises(build.BuildError) as caught:
        build.run_logged(["sh", "-c", script], log, what="mkosi")
    text = str(caught.value)
    assert "mkosi failed with status 100" in text
    assert str(log) in text
    assert "line 81\n" in text
    assert "line 80\n" not in text
    assert "line 1\n" in log.read_text()


def test_an_interrupted_build_waits_until_its_tool_has_cleaned_up(tmp_path: Path) -> None:
    begun, cleaned = tmp_path / "begun", tmp_path / "cleaned"
    tool = f"trap 'sleep 1; echo > {cleaned}; exit 1' TERM; echo > {begun}; while :; do sleep 0.1; done"
    script = (
        "import pathlib; from image.build import run_logged\n"
        f"run_logged(['sh', '-c', {tool!r}], pathlib.Path('{tmp_path}/log'), what='mkosi')\n"
    )
    argv = [sys.executable, "-c", script]
    with subprocess.Popen(argv, stderr=subprocess.DEVNULL, cwd=build.ROOT) as process:
        wait_until("the tool to start", begun.exists)
        process.send_signal(signal.SIGINT)
        process.wait(20)
    assert cleaned.exists()


def test_a_disk_that_fills_up_on_the_way_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(build, "build", full)
    assert build.main([]) == build.EXIT_FAILED
    assert capsys.readouterr().err == "image: [Errno 28] No space left on device\n"


def test_missing_tools_are_named_with_the_command_that_installs_them(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda program: None if program == "mmdebstrap" else program)
    with pytest.raises(build.BuildError, match=r"apt-get install -y .*mmdebstrap") as caught:
        build.check_needs()
    assert caught.value.status == build.EXIT_NEEDS


def test_too_little_disk_space_is_said_before_anything_starts(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda program: program)
    monkeypatch.setattr(build, "KEYRING", checkout / "mkosi.conf")
    monkeypatch.setattr(build, "FREE_BYTES_WANTED", 1 << 62)
    with pytest.raises(build.BuildError, match="GiB free, the build needs"):
        build.check_needs()


@pytest.mark.parametrize("version", ["x", "0 1", "0.1/2", "0.1_2", "0.1.0-a-label-too-long", "../0.1"])
def test_a_version_that_is_no_part_of_a_name_is_refused_at_once(
    version: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        build.main(["--version", version])
    assert "is not a version such as 0.2.0" in capsys.readouterr().err
