"""Fixtures and the three rings.

A test without a mark is in the unit ring: no root, a second or so. `net` needs root and namespaces, `image`
needs QEMU besides. Rings run in that order, so that a broken build fails in a minute. Where a ring cannot run
its tests are skipped with what is missing and how to get it; with CI=true in the environment every skip is a
failure, whoever asked for it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from image.build import image_path
from tests.lab import Lab, new_lab
from tests.replay import CONFIG, Bench

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / ".build"
TIMEOUT_S = {"unit": 60, "net": 180, "image": 2400}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=1, help="seed of the engine and of random traffic")
    parser.addoption("--steps", type=int, default=3000, help="steps of the state machine in all")
    parser.addoption("--update-golden", action="store_true", help="rewrite the files in tests/golden/")
    parser.addoption("--connections", type=int, default=200, help="idle connections through the pair")
    parser.addoption(
        "--talking", type=int, default=20, help="connections through the pair that talk all the time"
    )
    parser.addoption("--restarts", type=int, default=6, help="how often dsnatd is killed under connections")
    parser.addoption("--kills", type=int, default=300, help="how often the engine is killed under load")
    parser.addoption(
        "--scenarios", action="store_true", help="also the long boots: updates, NIC models, faults"
    )
    parser.addoption("--flood-seconds", type=float, default=10, help="how long VRRP is under a flood")
    parser.addoption("--hybrid-seconds", type=float, default=10, help="how long 200 clients talk at once")
    parser.addoption("--log-sessions", type=int, default=10_000, help="sessions that collectors are told of")
    parser.addoption("--log-rate", type=int, default=5_000, help="of them in a second")
    parser.addoption("--explain-packets", type=int, default=3000, help="packets that explain foretells")
    parser.addoption("--sessions", type=int, default=20_000, help="sessions in the table that is listed")
    parser.addoption("--scrapes", type=int, default=20, help="of the metrics, with and without sessions")
    parser.addoption("--realtime", action="store_true", help="measure as if others left the cores alone")
    parser.addoption("--reloads", type=int, default=10, help="reloads while connections stay open")


def ring(item: pytest.Item) -> str:
    return next((name for name in ("image", "net") if item.get_closest_marker(name)), "unit")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--scenarios"):
        items[:] = [item for item in items if not item.get_closest_marker("scenario")]
    for item in items:
        name = ring(item)
        if name == "unit":
            item.add_marker(pytest.mark.unit)
        if not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(TIMEOUT_S[name]))
    items.sort(key=lambda item: ("unit", "net", "image").index(ring(item)))


def ring_lacks(name: str) -> str:
    """Why the ring cannot run here; "" when it can."""
    if name == "unit":
        return ""
    if os.geteuid():
        return f"the {name} ring needs root; run `sudo make test-{name}`"
    if not Path("/dev/net/tun").exists():
        return f"the {name} ring needs /dev/net/tun; run `modprobe tun`"
    if name == "image" and not shutil.which("qemu-system-x86_64"):
        return "the image ring needs QEMU; run `make setup`"
    return ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    lacks = ring_lacks(ring(item))
    if lacks:
        pytest.skip(lacks)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and os.environ.get("CI") == "true" and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI, where nothing may be: {call.excinfo.value if call.excinfo else ''}"
    return report


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    value: int = request.config.getoption("--seed")
    return value


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Compares text with tests/golden/<test's name>.txt; --update-golden rewrites it."""
    path = ROOT / "tests/golden" / f"{request.node.name}.txt"

    def compare(text: str) -> None:
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        assert text == path.read_text(), f"differs from {path}; --update-golden rewrites it"

    return compare


@pytest.fixture
def program() -> Callable[[str], Path]:
    """The sanitized build of one of the engine's programs."""

    def find(name: str) -> Path:
        path = BUILD / "engine-debug" / name
        assert path.exists(), f"{path} is not built; run `make build`"
        return path

    return find


@pytest.fixture
def bench(program: Callable[[str], Path], tmp_path: Path, seed: int) -> Iterator[Callable[[str], Bench]]:
    """Starts dsnat-replay with a configuration of the test's own. Every engine must end cleanly, sanitizers
    included.
    """
    started: list[Bench] = []

    def start(config: str = CONFIG) -> Bench:
        path = tmp_path / f"dsnatd-{len(started)}.yaml"
        path.write_text(config)
        one = Bench(program("dsnat-replay"), path, seed=seed, log=path.with_suffix(".log"))
        started.append(one)
        return one

    yield start
    for one in started:
        status = one.close()
        assert status == 0, f"dsnat-replay ended with status {status}:\n{one.log.read_text()[-4000:]}"


@pytest.fixture
def replay(bench: Callable[[], Bench]) -> Bench:
    """One engine with the configuration tests.replay.CONFIG: `replay(packet, ...)` gives one answer per
    packet.
    """
    return bench()


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with new_lab(tmp_path) as made:
        yield made


@pytest.fixture(scope="session")
def built_image() -> Path:
    """The gateway image, built from this very tree; nothing is done when it is up to date."""
    argv = [sys.executable, "-m", "image.build"]
    done = subprocess.run(
        argv, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return image_path()
