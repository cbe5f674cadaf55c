"""dsnatctl and ipvsadm where something else than dsnatd listens on the socket."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsnatctl import ipvsadm, metrics
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
