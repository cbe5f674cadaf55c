"""The record of a run, from which `resume` goes on.

One file per run in `.dsnat-fleet/` beside fleet.yaml: JSON lines, each on disk before the next step. The
first says what was wanted of whom; then one for each gateway that came to an end. A run that was killed
has no last word, and needs none: what a gateway really runs is asked again, the journal only says what
the run was about.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

FOLDER = ".dsnat-fleet"
KEEP = 100  # runs


class JournalError(Exception):
    """There is no run to go on with, or it cannot be read. One sentence."""


@dataclass(frozen=True)
class Run:
    """A run as its journal tells it."""

    path: Path
    plan: str
    wanted: Mapping[str, str]  # gateway -> digest of its files
    outcomes: Mapping[str, str]

    @property
    def left(self) -> list[str]:
        """Gateways that did not get the change, in the order of the run."""
        return [name for name in self.wanted if self.outcomes.get(name) not in ("confirmed", "unchanged")]


class Journal:
    def __init__(self, directory: Path, plan: str, wanted: Mapping[str, str]) -> None:
        folder = directory / FOLDER
        folder.mkdir(exist_ok=True)
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        self.path = folder / f"{stamp}-{plan}.jsonl"
        self.add({"run": plan, "wanted": dict(wanted)})
        for old in sorted(folder.glob("*.jsonl"))[:-KEEP]:
            old.unlink(missing_ok=True)

    def add(self, line: Mapping[str, object]) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, json.dumps(line).encode() + b"\n")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def last_run(directory: Path) -> Run:
    paths = sorted((directory / FOLDER).glob("*.jsonl"))
    if not paths:
        raise JournalError(f"there is no run to go on with in {directory / FOLDER}; begin one with push")
    lines: list[dict[str, object]] = []
    for text in paths[-1].read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            break  # the last line of a machine that lost power
        if isinstance(line, dict):
            lines.append(line)
    if not lines or not isinstance(lines[0].get("wanted"), dict):
        raise JournalError(f"{paths[-1]} does not say what the run was about; push again")
    wanted = lines[0]["wanted"]
    assert isinstance(wanted, dict)
    outcomes = {str(line["gateway"]): str(line["outcome"]) for line in lines[1:] if "gateway" in line}
    return Run(paths[-1], str(lines[0]["run"]), wanted, outcomes)
