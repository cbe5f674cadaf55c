"""SIGKILL at random moments under load (dataplane/io/bench/kill.c): what the next engine finds in the table.

A few hundred kills here; `pytest tests/dataplane/test_kill.py --kills 10000` is the long run.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def kill(program: Path, *options: str) -> dict[str, Any]:
    done = subprocess.run([str(program), *options], capture_output=True, text=True, check=False, timeout=3000)
    assert done.stdout, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    assert said["well"] == (done.returncode == 0)
    return said


def test_every_session_survives_kill_minus_9_at_any_moment_under_load(
    program: Callable[[str], Path],
    request: pytest.FixtureRequest,
    record_property: Callable[[str, object], None],
) -> None:
    kills = int(request.config.getoption("--kills"))
    said = kill(program("dsnat-kill"), "--kills", str(kills), "--seed", "1")
    print(said)
    record_property("kills", said)
    assert said["well"], said["complaint"]
    assert said["kills"] == kills
    # the load ran, sessions began and ended, and it was killed in the midst of it and while it adopted
    assert said["loaded"] > kills // 4
    assert said["adopting"] > 0
    assert said["opened"] > said["ended"] > 1000


def test_a_session_that_came_back_with_another_port_is_noticed(program: Callable[[str], Path]) -> None:
    said = kill(program("dsnat-kill"), "--kills", "60", "--damage")
    assert not said["well"]
    assert "has another outside address or port" in said["complaint"]
