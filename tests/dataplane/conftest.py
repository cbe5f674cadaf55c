"""An engine with a control socket, and dsnatctl to ask it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dsnatctl.__main__ import main
from tests.replay import CONFIG, Bench

Ctl = Callable[..., tuple[int, str, str]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control.sock"


@pytest.fixture
def engine(program: Callable[[str], Path], tmp_path: Path, path: Path, seed: int) -> Iterator[Bench]:
    config = tmp_path / "dsnatd.yaml"
    config.write_text(CONFIG)
    bench = Bench(
        program("dsnat-replay"), config, seed=seed, log=tmp_path / "log", options=("--socket", str(path))
    )
    bench.wait(0)  # answered: the socket is there
    yield bench
    assert bench.close() == 0, (tmp_path / "log").read_text()


@pytest.fixture
def ctl(path: Path, capsys: pytest.CaptureFixture[str]) -> Ctl:
    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = main([*words, "--socket", str(path)])
        except SystemExit as stop:
            status = int(stop.code or 0)
        out = capsys.readouterr()
        return status, out.out, out.err

    return run
