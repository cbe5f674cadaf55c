"""Two engines in two processes, kept equal by the real sync over loopback (dataplane/io/bench/sync.c)."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def sync(program: Path, *options: str) -> dict[str, Any]:
    port = 20000 + os.getpid() % 20000  # several test runs on one machine
    argv = [str(program), "--port", str(port), "--sessions", "65536", *options]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    said: dict[str, Any] = json.loads(done.stdout)
    print(said)
    assert said["well"]
    assert said["differ"] == 0
    assert said["sessions"] == said["standby"]
    return said


def test_a_standby_gets_every_session_while_new_ones_begin(program: Callable[[str], Path]) -> None:
    said = sync(program("dsnat-sync"), "--fill", "5000", "--rate", "5000", "--seconds", "2")
    assert said["sessions"] == 15000
    assert said["bytes_per_session"] < 80


@pytest.mark.parametrize("loss", [1, 10, 30])
def test_both_tables_are_equal_whatever_the_link_loses(program: Callable[[str], Path], loss: int) -> None:
    said = sync(
        program("dsnat-sync"), "--fill", "1500", "--rate", "2000", "--seconds", "1", "--loss", str(loss)
    )
    assert said["sessions"] == 3500
    if loss > 1:
        assert said["again"] > 0, "nothing was lost"


def test_a_standby_that_comes_back_with_an_empty_table_gets_everything(
    program: Callable[[str], Path],
) -> None:
    said = sync(program("dsnat-sync"), "--fill", "3000", "--rate", "3000", "--seconds", "2", "--restart")
    assert said["sessions"] == 9000
