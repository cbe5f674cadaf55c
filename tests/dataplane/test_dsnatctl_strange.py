"""dsnatctl and ipvsadm in the hands of a stranger: something else listens, or the words make no sense."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from dsnatctl import ipvsadm, metrics
from dsnatctl.__main__ import main
from tests.dataplane.conftest import Ctl

ANSWERS = [
    b'{"ok":true}',
    b"{}",
    b"[]",
    b'"ok"',
    b"HTTP/1.1 400 Bad Request",
    b"\xff\xfe",
    b'{"ok":true,"sessions":5,"pools":"x","config":[],"workers":{},"zones":null,"counters":3}',
    b'{"ok":true,"sessions":[{}],"pools":[{}],"config":{"pools":[{}]},"workers":[{}],"zones":[{}]}',
]
SHOWN = ("sessions", "pools", "destinations", "zones", "counters", "workers", "ports", "config", "sync")
ASKING = [
    "status",
    "version",
    "rfc",
    *(f"show {what}" for what in SHOWN),
    "who 203.0.113.1:40211",
    "explain inside0 tcp 100.64.1.2:4000 198.51.100.7:443",
    "clear --all",
    "reload",
    "top --once --seconds 0.05",
    "capture --count 1 --seconds 0.1",
]


class Stranger(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    said = b""


class Line(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, Stranger)
        with suppress(OSError):  # who has read enough hangs up
            while self.rfile.readline():
                self.wfile.write(self.server.said + b"\n")


@pytest.fixture
def stranger(path: Path) -> Iterator[Stranger]:
    with Stranger(str(path), Line) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("words", ASKING)
def test_what_is_not_dsnatd_is_named_in_one_sentence(
    stranger: Stranger, ctl: Ctl, path: Path, words: str
) -> None:
    for said in ANSWERS:
        stranger.said = said
        status, _, err = ctl(*words.split())
        if said.startswith(b'{"ok":true') and status == 0:
            continue  # as empty as that, but an answer
        assert status == 3, (said, err)
        assert err.startswith("dsnatctl: ")
        assert err.count("\n") == 1
        assert str(path) in err
        assert "--socket" in err


def test_debug_shows_where_an_answer_could_not_be_read(stranger: Stranger, ctl: Ctl) -> None:
    stranger.said = b'{"ok":true}'
    with pytest.raises(KeyError):
        ctl("show", "pools", "--debug")


@pytest.mark.parametrize("said", ANSWERS)
def test_figures_and_the_old_command_say_so_too(
    stranger: Stranger, path: Path, capsys: pytest.CaptureFixture[str], said: bytes
) -> None:
    stranger.said = said
    page = metrics.scrape(str(path))
    assert "dsnatd" in page.splitlines()[0]
    assert "dsnat_up 0" in page
    assert ipvsadm.main(["-ln"], socket_path=str(path)) == 3
    err = capsys.readouterr().err
    assert err.startswith("ipvsadm: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ("status --socket FOLDER", 3, "FOLDER is not a socket; give dsnatd's with --socket"),
        (
            "status --socket FOLDER/none",
            3,
            "FOLDER/none is not there: dsnatd does not run; start dsnatd",
        ),
        ("status --socket=", 3, "an empty path cannot be used (Invalid argument); give another --socket"),
        (
            "plan FOLDER/none",
            2,
            "FOLDER/none cannot be read (No such file or directory); give",
        ),
        ("plan FOLDER/bytes", 2, "FOLDER/bytes is not UTF-8 text; give a configuration file"),
        ("clear --all --state lost", 2, "argument --state: invalid choice: 'lost' (choose from 'opening', "),
        ("show sessions --limit 0", 2, "argument --limit: '0' is not a whole number from 1 up"),
        ("show pools --seconds -1", 2, "argument --seconds: '-1' is not a number from 0 to 86400"),
        ("capture --seconds nan", 2, "argument --seconds: 'nan' is not a number from 0 to 86400"),
        ("explain i tcp a b --ttl 999", 2, "argument --ttl: '999' is not a whole number from 0 to 255"),
        ("metrics --listen 192.0.2.1:9", 1, "(Cannot assign requested address); give another --listen"),
        ("release --socket FOLDER/none", 2, "forwards packets untranslated; say so with --yes"),
    ],
)
def test_words_that_make_no_sense_are_answered_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, status: int, said: str
) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff")
    try:
        ended = main(words.replace("FOLDER", str(tmp_path)).split())
    except SystemExit as stop:
        ended = int(stop.code or 0)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("dsnatctl")
    assert said.replace("FOLDER", str(tmp_path)) in last
    assert ended == status
