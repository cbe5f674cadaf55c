"""top, support, the man page, the completion: what dsnatctl has beside asking."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import termios
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from dsnatctl import support, top, words
from dsnatctl.arguments import parser
from tests.packet import udp
from tests.replay import Bench

Ctl = Callable[..., tuple[int, str, str]]
VERBS = [name for name, _, _ in words.verbs(parser())]


def test_top_prints_one_frame_of_rates(engine: Bench, ctl: Ctl) -> None:
    for n in range(4):
        engine.send(udp(f"100.64.0.{n + 2}:4000 > 198.51.100.1:80"))
    engine.send(udp("100.127.0.2:4000 > 198.51.100.1:80"))

    status, out, _ = ctl("top", "--once", "--seconds", "0.1")

    lines = out.splitlines()
    assert status == 0
    assert "4 sessions (0.0 % of all)  every packet accounted for" in lines[0]
    assert "packets/s 0 in, 0 forwarded" in lines[1]
    assert next(line for line in lines if line.startswith("g1")).split()[:3] == ["g1", "4", "4"]
    assert next(line for line in lines if line.startswith("no_zone")).split()[1:3] == ["0", "1"]


def test_top_takes_rates_from_the_difference_of_two_samples(engine: Bench, path: Path) -> None:
    from dsnatctl.client import Engine

    with Engine(str(path)) as client:
        before = top.sample(client)
        for n in range(10):
            engine.send(udp(f"100.64.0.{n + 2}:4000 > 198.51.100.1:80"))
        after = top.sample(client)
    after = top.Sample(before.at_s + 2.0, after.status, after.shows)

    lines = list(top.frame(before, after))

    assert "packets/s 5 in, 5 forwarded, 0 passed, 0 dropped" in lines[1]
    assert "sessions/s 5 new" in lines[1]
    assert next(line for line in lines if line.startswith("g1")).split() == ["g1", "4", "10", "5", "0"]


def test_top_without_a_terminal_says_what_to_do(ctl: Ctl, engine: Bench) -> None:
    status, _, err = ctl("top")
    assert (status, "--once" in err) == (2, True)


def test_top_is_a_live_screen_that_ends_with_q(engine: Bench, path: Path) -> None:
    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 120, 0, 0))
    there = {key: value for key, value in os.environ.items() if key not in ("LINES", "COLUMNS")}
    there |= {"PYTHONPATH": str(Path(words.__file__).parents[1]), "TERM": "xterm"}
    argv = [sys.executable, "-m", "dsnatctl", "top", "--seconds", "0.1", "--socket", str(path)]
    live = subprocess.Popen(argv, stdin=terminal, stdout=terminal, stderr=terminal, env=there)
    os.close(terminal)
    shown = b""
    while b"every packet accounted for" not in shown:  # else the end of the terminal is an OSError
        shown += os.read(screen, 65536)
    os.write(screen, b"q")
    drain = threading.Thread(target=read_all, args=(screen,), daemon=True)
    drain.start()
    assert live.wait(20) == 0
    assert b"q ends" in shown


def read_all(screen: int) -> None:
    with suppress(OSError):
        while os.read(screen, 65536):
            pass
    os.close(screen)


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (1.25, "1.2"), (99_999, "99999"), (123_456, "123k"), (4.56e9, "4.6G")]
)
def test_large_rates_are_short(value: float, text: str) -> None:
    assert top.short(value) == text


def test_support_makes_one_archive_and_says_what_it_lacks(engine: Bench, ctl: Ctl, tmp_path: Path) -> None:
    engine.send(udp("100.64.0.2:4000 > 198.51.100.1:80"))
    file = tmp_path / "a.tar.gz"
    config = tmp_path / "dsnatd.yaml"

    status, out, _ = ctl("support", "--output", str(file), "--config", str(config), "--json")

    told = json.loads(out)
    with tarfile.open(file) as tar:
        names = {name.removeprefix("dsnat-support/") for name in tar.getnames()}
        missing = json.load(tar.extractfile("dsnat-support/missing.json") or sys.stdin)
        counters = json.load(tar.extractfile("dsnat-support/engine/counters.json") or sys.stdin)
    assert status == 0
    assert file.stat().st_mode & 0o777 == 0o600
    assert counters["counters"]["forwarded"] == 1
    assert {
        "engine/status.json",
        "engine/pools.json",
        "configuration/dsnatd.yaml",
        "kernel/proc/interrupts",
    } <= names
    assert "engine/sessions.json" not in names, "sessions name hosts"
    assert missing == told["missing"]
    assert set(told["collected"]) == names
    assert all(one["why"] for one in missing)


def test_support_works_without_an_engine(tmp_path: Path) -> None:
    archive = support.write(
        str(tmp_path / "b.tar.gz"), socket_path=str(tmp_path / "none"), config=str(tmp_path / "none.yaml")
    )
    lacks = {one["what"]: one["why"] for one in archive.missing}
    assert "dsnatd does not run" in lacks["engine"]
    assert "No such file" in lacks["configuration/dsnatd.yaml"]


@pytest.mark.parametrize(
    ("line", "left"),
    [
        ("    auth_pass s3cret", "    auth_pass (removed)"),
        ("PrivateKey=abc=", "PrivateKey=(removed)"),
        ("PresharedKey = abc", "PresharedKey = (removed)"),
        ("password: hunter2  # x", "password: (removed)"),
        ("  - {source: 100.64.0.0/16, pool: g1}", "  - {source: 100.64.0.0/16, pool: g1}"),
        ("# the password is elsewhere", "# the password is elsewhere"),
        ("00112233445566778899AABBccddeeff" * 2, "(removed)"),  # all of sync.key
        (f"sha256 {'ab' * 32}", f"sha256 {'ab' * 32}"),
    ],
)
def test_support_blanks_secrets(line: str, left: str) -> None:
    assert support.without_secrets(line) == left


def test_the_man_page_has_every_verb_and_option_and_no_stray_request() -> None:
    page = words.man()
    plain = page.replace("\\-", "-").replace("\\fB", "").replace("\\fI", "").replace("\\fR", "")
    for verb, _, one in words.verbs(parser()):
        assert f".SS dsnatctl {verb}" in plain
        for action in words.options(one):
            assert not action.option_strings or action.option_strings[-1] in plain
    requests = {line.split()[0] for line in page.splitlines() if line.startswith(".")}
    assert requests <= {".TH", ".SH", ".SS", ".TP", ".B", ".I", ".BR"}
    if shutil.which("groff"):
        done = subprocess.run(
            ["groff", "-man", "-Tutf8", "-ww", "-z"], input=page, capture_output=True, text=True, check=True
        )
        assert done.stderr == ""


def complete(*line: str) -> set[str]:
    """What bash offers for the last word."""
    script = (
        words.bash()
        + 'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _dsnatctl; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", script, "-", *line], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return set(done.stdout.split())


def test_the_shell_completes_verbs_options_and_values() -> None:
    assert complete("dsnatctl", "") == {verb.split()[0] for verb in VERBS}
    assert complete("dsnatctl", "re") == {"reload", "release"}
    assert complete("dsnatctl", "show", "p") == {"pools", "ports"}
    assert {"--host", "--older-s", "--json"} <= complete("dsnatctl", "show", "sessions", "--")
    assert complete("dsnatctl", "show", "sessions", "--protocol", "") == {"tcp", "udp", "icmp"}
    assert complete("dsnatctl", "--json", "clear", "--a") == {"--all"}


def test_every_verb_is_in_the_readme() -> None:
    readme = (Path(__file__).resolve().parents[2] / "dataplane/README.md").read_text()
    for verb in VERBS:
        alone = re.search(rf"`(dsnatctl )?{verb}\b", readme)
        assert alone, f"dsnatctl {verb} has no row in dataplane/README.md"


def test_every_option_in_the_readmes_table_is_one_that_the_verb_takes() -> None:
    readme = (Path(__file__).resolve().parents[2] / "dataplane/README.md").read_text()
    takes = {name: set(one._option_string_actions) for name, _, one in words.verbs(parser())}
    for row in re.findall(r"^\| (`dsnatctl .*)\|$", readme, re.MULTILINE):
        named = re.findall(r"`dsnatctl ((?:show )?[a-z]+)", row.split(" | ")[0])
        options = set(re.findall(r"(?<![a-z-])--[a-z-]+", row))
        assert options <= set().union(*(takes[verb] for verb in named)), row


def test_no_module_that_a_verb_does_not_need_is_loaded_at_the_start() -> None:
    code = "import sys; import dsnatctl.__main__ as start; start.parser(); print(*sys.modules)"
    root = str(Path(words.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=True,
    )
    heavy = {"curses", "tarfile", "ctypes", "http.server", "dsnatctl.top", "dsnatctl.words", "ipaddress"}
    assert not heavy & set(done.stdout.split())
