"""tests/setup.sh on machines that are not like this one: a folder of stand-ins comes first in PATH."""

from __future__ import annotations

import fcntl
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
    env["SETUP_POLICY"] = str(clone / "policy-rc.d")
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


def test_disk_space_is_looked_at_also_where_an_earlier_set_up_left_off(clone: Path) -> None:
    (clone / ".build/tools").mkdir(parents=True)
    done = setup(
        clone,
        df="printf 'Avail\\n  120\\n'",
        du="printf '2000\\t.build\\n'",
        apt_get="echo called >&2; exit 1",
        id="echo 0",
    )
    assert done.returncode == 4
    assert "120 MiB free but building the gateway needs 4000 MiB" in done.stderr
    assert "called" not in done.stderr


def test_what_root_has_built_is_not_a_riddle_to_who_comes_after(clone: Path) -> None:
    lock = clone / ".build/setup.lock"
    lock.parent.mkdir()
    lock.touch()
    lock.chmod(0o444)
    argv = [str(clone / "tests/setup.sh")]
    if not os.geteuid():  # a root who may not write what its mode forbids
        argv = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override", *argv]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "run as " in done.stderr


def test_a_second_set_up_says_that_it_waits_for_the_first(clone: Path) -> None:
    (clone / ".build").mkdir()
    with (clone / ".build/setup.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        argv = [str(clone / "tests/setup.sh")]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                assert "waits for another set-up" in process.stdout.readline()
            finally:
                process.kill()


def test_services_may_not_start_while_packages_are_installed_and_a_failing_apt_is_shown(clone: Path) -> None:
    apt_get = 'cat "$SETUP_POLICY"; echo "E: no such archive"; exit 100'
    done = setup(clone, id="echo 0", dpkg_query="true", apt_get=apt_get)
    assert done.returncode == 1
    assert "exit 101\nE: no such archive\n" in done.stderr
    assert not (clone / "policy-rc.d").exists()


def test_a_policy_of_the_operators_own_is_left_alone(clone: Path) -> None:
    policy = clone / "policy-rc.d"
    policy.write_text("#!/bin/sh\nexit 0\n")
    assert setup(clone, id="echo 0", dpkg_query="true", apt_get="exit 100").returncode == 1
    assert policy.read_text() == "#!/bin/sh\nexit 0\n"
