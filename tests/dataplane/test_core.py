"""The C tests that stand beside the data structures they test (dataplane/core/*_test.c), sanitizers on."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_c_tests_pass_under_asan_and_ubsan() -> None:
    argv = ["meson", "test", "-C", str(ROOT / ".build/engine-debug"), "--no-rebuild", "--print-errorlogs"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "No tests defined" not in done.stdout + done.stderr
