"""Many small flows at once through a gateway, and a server that gives each byte back.

Sockets are made inside the namespaces of client and server and used from here.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

from tests.lab import Netns

PORT = 7103


@contextmanager
def echo(server: Netns, address: str) -> Iterator[None]:
    """UDP and TCP on PORT, each byte back to where it came from."""
    ready, stop = threading.Event(), threading.Event()

    def serve_tcp(peer: socket.socket) -> None:
        with peer, suppress(OSError):
            while data := peer.recv(4096):
                peer.sendall(data)

    def job() -> None:
        with ExitStack() as undo:
            listener = undo.enter_context(socket.create_server((address, PORT), backlog=256))
            listener.settimeout(0.1)
            datagrams = undo.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            datagrams.bind((address, PORT))
            datagrams.settimeout(0.01)
            ready.set()
            while not stop.is_set():
                with suppress(TimeoutError):
                    threading.Thread(target=serve_tcp, args=(listener.accept()[0],), daemon=True).start()
                with suppress(TimeoutError):
                    while True:
                        data, sender = datagrams.recvfrom(8192)
                        datagrams.sendto(data, sender)

    thread = threading.Thread(target=server.inside, args=(job,), daemon=True)
    thread.start()
    assert ready.wait(20)
    try:
        yield
    finally:
        stop.set()
        thread.join(20)


def flows(
    client: Netns, server: str, kind: int, count: int, *, source: str = "0.0.0.0", timeout_s: float = 20
) -> list[socket.socket]:
    """So many sockets at once, each of which has had its own words back."""

    def job() -> list[socket.socket]:
        made = []
        for number in range(count):
            one = socket.socket(socket.AF_INET, kind)
            one.settimeout(timeout_s)
            one.bind((source, 0))
            one.connect((server, PORT))
            one.send(f"hello {number}".encode())
            made.append(one)
        return made

    made: list[socket.socket] = client.inside(job)
    for number, one in enumerate(made):
        assert one.recv(4096) == f"hello {number}".encode()
    return made


def talk(made: Sequence[socket.socket], word: str) -> None:
    """All at once say something, and each hears its own again."""
    for number, one in enumerate(made):
        one.send(f"{word} {number}".encode())
    for number, one in enumerate(made):
        assert one.recv(4096) == f"{word} {number}".encode()
