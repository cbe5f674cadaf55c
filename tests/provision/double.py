"""SSH servers that do what OpenSSH cannot be asked to do: answer wrongly, late, half or not at all.

A double is a paramiko server on the loopback. Before SSH begins, `greet` may spoil the connection; after
an exec request, `behave` gets the channel and the number of this connection. As a program, `python -m
tests.provision.double N DIRECTORY` runs N gateways in memory behind N such servers and prints where they
are: a fleet in one process.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import paramiko
from paramiko.common import AUTH_FAILED, AUTH_SUCCESSFUL, OPEN_SUCCEEDED

from provision.agent import Refused
from provision.agent.command import reply
from provision.agent.state import State
from tests.provision.machine import FakeMachine

Behaviour = Callable[[paramiko.Channel, int], None]


class _Server(paramiko.ServerInterface):
    def __init__(self, key: paramiko.PKey | None) -> None:
        self.key = key
        self.asked = threading.Event()

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return OPEN_SUCCEEDED

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        good = self.key is None or key == self.key
        return AUTH_SUCCESSFUL if good else AUTH_FAILED

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        self.asked.set()  # the work begins when this request has been answered
        return True


@dataclass
class Double:
    behave: Behaviour
    host_key: paramiko.PKey
    user_key: paramiko.PKey | None = None
    greet: Callable[[socket.socket, int], bool] = lambda sock, number: True
    connections: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Double:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", 0))
        self._socket.listen(64)
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def public_key(self) -> str:
        return f"{self.host_key.get_name()} {self.host_key.get_base64()}"

    def _accept(self) -> None:
        while not self._stop.is_set():
            try:
                sock, _ = self._socket.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(sock, self.connections), daemon=True).start()

    def _serve(self, sock: socket.socket, number: int) -> None:
        try:
            if not self.greet(sock, number):
                sock.close()
                return
            transport = paramiko.Transport(sock)
            transport.add_server_key(self.host_key)
            server = _Server(self.user_key)
            transport.start_server(server=server)
            channel = transport.accept(10)
            if channel is not None and server.asked.wait(10):
                self.behave(channel, number)
        except (paramiko.SSHException, EOFError, OSError):
            pass


def answer(channel: paramiko.Channel, text: str, status: int | None = 0) -> None:
    channel.sendall(text.encode())
    if status is not None:
        channel.send_exit_status(status)
    channel.close()


def read_request(channel: paramiko.Channel) -> bytes:
    parts = []
    while data := channel.recv(65536):
        parts.append(data)
    return b"".join(parts)


def new_key() -> paramiko.PKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    private = Ed25519PrivateKey.generate()
    import io

    text = private.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()).decode()
    return paramiko.Ed25519Key.from_private_key(io.StringIO(text))


class Gateway:
    """A gateway in memory as a double's behaviour: the real agent over a fake machine, one request at a
    time.
    """

    def __init__(self, root: Path, held: list[str], delay_s: float = 0.0) -> None:
        self.machine = FakeMachine(root)
        self.machine.real_time()
        self.held, self.delay_s = held, delay_s
        self.lock = threading.Lock()

    def __call__(self, channel: paramiko.Channel, number: int) -> None:
        # One connection may carry several requests, each in a channel of its own.
        opened = self.machine.clock()
        transport = channel.get_transport()
        current: paramiko.Channel | None = channel
        while current is not None:
            request = json.loads(read_request(current))
            if self.delay_s:
                threading.Event().wait(self.delay_s)
            with self.lock:
                self.machine.connection = opened
                try:
                    result = reply(State(self.machine), request)
                    if request["do"] == "facts":
                        result["addresses"] = {"outside0": self.held}
                        result["units"] = {"keepalived": "active"}
                    text = json.dumps({"protocol": 1, "ok": True, "result": result})
                except Refused as refused:
                    error = {"kind": refused.kind, "text": str(refused)}
                    text = json.dumps({"protocol": 1, "ok": False, "error": error})
            answer(current, text + "\n")
            current = transport.accept(20)


def main() -> None:
    """N gateways, until standard input ends. 2 % are dead, 1 % show another key, 1 % are slow."""
    logging.getLogger("paramiko").setLevel(logging.CRITICAL)
    count, directory = int(sys.argv[1]), Path(sys.argv[2])
    user_key = paramiko.PKey.from_path(directory / "user")
    found = []
    dead: list[Double] = []
    with contextlib.ExitStack() as stack:
        for number in range(count):
            name = f"gw{number}"
            kind = {3: "dead", 53: "dead", 7: "wrong-key", 11: "slow"}.get(number % 100, "good")
            key = new_key()
            gateway = Gateway(
                directory / name, [f"198.51.100.{number % 250 + 1}"], 2.0 if kind == "slow" else 0.0
            )
            double = stack.enter_context(Double(gateway, key, user_key))
            pinned = new_key() if kind == "wrong-key" else key
            public = f"{pinned.get_name()} {pinned.get_base64()}"
            found.append({"name": name, "port": double.port, "key": public, "kind": kind})
            if kind == "dead":
                dead.append(double)
        for double in dead:  # only now: a port that is given back earlier may be the next one's
            double.__exit__()
        print(json.dumps(found), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
