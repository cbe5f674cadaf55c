"""tests/setup.sh on machines that are not like this one: a folder of stand-ins comes first in PATH."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A checkout that has never been set up: only what the script reads."""
    for name in ("tests/setup.sh", "provision/requirements.lock", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def setup(clone: Path, **stand_ins: str) -> subprocess.CompletedProcess[str]:
    folder = clone / "stand-ins"
    folder.mkdir()
    for name, script in stand_ins.items():
        path = folder / name.replace("_", "-")
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    env = {**os.environ, "PATH": f"{folder}:/usr/sbin:/usr/bin:/sbin:/bin"}
    argv = [str(clone / "tests/setup.sh")]
    return subprocess.run(argv, env=env, capture_output=True, text=True, check=False, timeout=60)


def test_without_root_it_prints_the_one_line_to_run(clone: Path) -> None:
    done = setup(clone, id="echo 1000", dpkg_query="echo 'ii  gcc'")
    assert done.returncode == 3
    assert "run: sudo apt-get install -y --no-install-recommends " in done.stderr
    assert " libdpdk-dev " in done.stderr
    assert " gcc " not in done.stderr
    assert not (clone / ".venv").exists()


def test_too_little_disk_space_is_noticed_before_anything_is_installed(clone: Path) -> None:
    done = setup(clone, df="printf 'Avail\\n  120\\n'", apt_get="echo called >&2; exit 1")
    assert done.returncode == 4
    assert "120 MiB free" in done.stderr
    assert "called" not in done.stderr


def test_a_failing_apt_is_shown_and_leaves_no_policy_behind(clone: Path) -> None:
    policy = Path("/usr/sbin/policy-rc.d")
    before = policy.read_text() if policy.exists() else None
    done = setup(clone, id="echo 0", dpkg_query="true", apt_get="echo 'E: no such archive'; exit 100")
    assert done.returncode == 1 or os.geteuid()
    assert "E: no such archive" in done.stderr or os.geteuid()
    assert (policy.read_text() if policy.exists() else None) == before
