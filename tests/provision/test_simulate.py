"""The simulation agrees with arithmetic, and the README with the simulation."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

from provision.simulate import picture, simulate, sizing, sizing_table

ROOT = Path(__file__).resolve().parents[2]


def test_a_resilient_table_moves_little_more_than_it_must_and_others_much_more() -> None:
    steps = simulate(8, 20_000, 256, seed=1)
    assert [step.members for step in steps[:3]] == [7, 8, 9]
    for step in steps:
        assert step.moved["resilient"] < step.ideal + 0.03, step
        assert step.moved["resilient"] < step.moved["threshold"] < step.moved["modulo"] + 0.01, step
        assert step.addresses < step.ideal + 0.03, step
        assert step.spread <= 1.2, step
    assert abs(steps[0].moved["modulo"] - 7 / 8) < 0.02, "all but one in eight"


def test_the_picture_is_whole() -> None:
    steps = simulate(4, 1000, 64, seed=1)
    root = ET.fromstring(picture(steps))
    assert len([e for e in root.iter() if e.tag.endswith("rect")]) == 1 + 4 * len(steps) + 4


def test_the_table_of_sizes_in_the_readme_is_the_one_that_the_program_prints() -> None:
    assert sizing_table() in (ROOT / "provision/README.md").read_text()


def test_one_gateway_more_than_needed_is_always_there() -> None:
    (row,) = sizing([100])
    assert row[5] == "2 + 1"


def test_the_program_prints_its_table() -> None:
    words = ("--gateways", "4", "--hosts", "1000", "--addresses", "64")
    argv = [sys.executable, "-m", "provision.simulate", *words]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "eight are new" in done.stdout
