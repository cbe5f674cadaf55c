"""Ugly SSH: every way to fail has its own name, ends in time, and hides nothing that may have happened."""

from __future__ import annotations

import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import paramiko
import pytest

from provision.push import NoAgent, SshRemote
from provision.ssh import (
    AuthFailed,
    Connection,
    ConnectTimeout,
    HostKeyMismatch,
    LostInFlight,
    OutputLimit,
    RemoteTimeout,
    Target,
    Throttled,
    Unreachable,
    dial,
)
from tests.provision.double import Behaviour, Double, answer, new_key, read_request
from tests.provision.sshd import make_key

HOST_KEY = new_key()

Serve = Callable[..., Double]
Connect = Callable[..., Connection]


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "user"
    make_key(path)
    return path


@pytest.fixture
def serve() -> Iterator[Callable[..., Double]]:
    with ExitStack() as stack:

        def start(
            behave: Behaviour = lambda channel, number: answer(channel, "hello\n"), **more: object
        ) -> Double:
            return stack.enter_context(Double(behave, HOST_KEY, **more))  # type: ignore[arg-type]

        yield start


@pytest.fixture
def connect(identity: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Connection]]:
    monkeypatch.setattr(random, "uniform", lambda low, high: 0.01)  # retries without their pauses
    with ExitStack() as stack:

        def to(double: Double, *, timeout_s: float = 5.0, key: str | None = None) -> Connection:
            target = Target(
                "gw1", "127.0.0.1", double.port, "root", key or double.public_key(), identity, timeout_s
            )
            return stack.enter_context(dial(target))

        yield to


def test_a_command_is_run_and_its_output_and_status_come_back(serve: Serve, connect: Connect) -> None:
    done = connect(serve(lambda channel, number: answer(channel, "out", 3))).run(["x"])
    assert (done.status, done.output) == (3, "out")


def test_a_request_and_an_answer_of_megabytes_do_not_wait_for_each_other(
    serve: Serve, connect: Connect
) -> None:
    def echo(channel: paramiko.Channel, number: int) -> None:
        answer(channel, str(len(read_request(channel))) + "x" * (6 << 20))

    done = connect(serve(echo)).run(["x"], stdin=b"y" * (5 << 20))
    assert done.output.startswith(f"{5 << 20}x")
    assert len(done.output) > 6 << 20


def test_a_key_that_is_not_the_pinned_one_ends_the_connection(serve: Serve, connect: Connect) -> None:
    other = new_key()
    with pytest.raises(HostKeyMismatch, match="otherwise somebody stands between") as mismatch:
        connect(serve(), key=f"{other.get_name()} {other.get_base64()}")
    assert mismatch.value.got == HOST_KEY.fingerprint
    assert mismatch.value.want == other.fingerprint


def test_a_server_without_a_key_of_the_pinned_type_is_not_trusted(identity: Path, tmp_path: Path) -> None:
    rsa = paramiko.RSAKey.generate(2048)
    with Double(lambda channel, number: None, rsa) as double:
        target = Target(
            "gw1", "127.0.0.1", double.port, "root", f"ssh-ed25519 {HOST_KEY.get_base64()}", identity
        )
        with pytest.raises(HostKeyMismatch):
            dial(target)


def test_a_login_that_is_refused_names_the_key(serve: Serve, connect: Connect, identity: Path) -> None:
    with pytest.raises(AuthFailed, match=f"does not let root in with {identity}"):
        connect(serve(user_key=new_key()))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read (No such file or directory)"),
        ("", "is not a private key"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n", "is not a private key"),
        ("passphrase", "has a passphrase; load it into the ssh agent"),
    ],
)
def test_an_identity_that_cannot_be_used_is_said_before_anything_is_sent(
    serve: Serve, tmp_path: Path, text: str | None, said: str
) -> None:
    double, path = serve(), tmp_path / "operator"
    if text == "passphrase":
        argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", str(path)]
        subprocess.run(argv, check=True)
    elif text is not None:
        path.write_text(text)
    target = Target("gw1", "127.0.0.1", double.port, "root", double.public_key(), path)
    with pytest.raises(AuthFailed, match=re.escape(f"the identity {path} {said}")):
        dial(target)


def wait_for(event: threading.Event) -> None:
    event.wait(20)


def spoil(data: bytes, *, first: int = 1_000) -> Callable[[socket.socket, int], bool]:
    def greet(sock: socket.socket, number: int) -> bool:
        if number > first:
            return True
        if data:
            sock.sendall(data)
            sock.recv(64)
        return False

    return greet


@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        (b"Not allowed at this time\r\n", Throttled, "refuses this address for a while"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", Unreachable, "is not an SSH server"),
        (b"", Throttled, "closed the connection at once"),
    ],
)
def test_a_banner_that_fails_says_which_of_its_causes_it_was(
    serve: Serve, connect: Connect, data: bytes, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        connect(serve(greet=spoil(data)))


def test_a_server_that_was_too_busy_is_tried_again(serve: Serve, connect: Connect) -> None:
    double = serve(greet=spoil(b"", first=2))
    assert connect(double).run(["x"]).output == "hello\n"
    assert double.connections == 3


def test_a_server_that_says_nothing_is_given_up_in_time(serve: Serve, connect: Connect) -> None:
    silent = threading.Event()

    def greet(sock: socket.socket, number: int) -> bool:
        silent.wait(20)
        return False

    begun = time.monotonic()
    with pytest.raises(ConnectTimeout, match="does not speak SSH in time"):
        connect(serve(greet=greet), timeout_s=0.5)
    assert time.monotonic() - begun < 5
    silent.set()


def test_what_paramikos_threads_log_is_not_printed_besides() -> None:
    script = "import logging, provision.ssh; logging.getLogger('paramiko.transport').error('a traceback')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_nobody_at_the_address_is_unreachable(identity: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        key = f"ssh-ed25519 {HOST_KEY.get_base64()}"
        with pytest.raises(Unreachable, match="Connection refused"):
            dial(Target("gw1", "127.0.0.1", s.getsockname()[1], "root", key, identity))


def test_a_connection_that_ends_while_the_command_runs_is_lost_and_never_retried(
    serve: Serve, connect: Connect
) -> None:
    def die(channel: paramiko.Channel, number: int) -> None:
        read_request(channel)
        channel.get_transport().close()

    double = serve(die)
    with pytest.raises(LostInFlight):
        connect(double).run(["x"])
    assert double.connections == 1


def test_a_command_that_ends_without_a_status_is_lost(serve: Serve, connect: Connect) -> None:
    with pytest.raises(LostInFlight):
        connect(serve(lambda channel, number: answer(channel, "done", None))).run(["x"])


def test_a_command_that_does_not_end_is_given_up_at_the_deadline(serve: Serve, connect: Connect) -> None:
    over = threading.Event()
    connection = connect(serve(lambda channel, number: wait_for(over)))
    begun = time.monotonic()
    with pytest.raises(RemoteTimeout, match=r"no answer within 0\.5 s"):
        connection.run(["x"], deadline_s=0.5)
    assert time.monotonic() - begun < 3
    over.set()


def test_output_without_end_is_cut_off(serve: Serve, connect: Connect) -> None:
    def pour(channel: paramiko.Channel, number: int) -> None:
        while not channel.closed:
            channel.sendall(b"x" * 65536)

    with pytest.raises(OutputLimit):
        connect(serve(pour)).run(["x"], output_max=1 << 20)


@pytest.mark.parametrize("said", ["bash: /usr/lib/dsnat/agent: No such file\n", "", "{not json\n"])
def test_a_machine_without_an_agent_is_said_to_be_none(serve: Serve, connect: Connect, said: str) -> None:
    remote = SshRemote("gw1", connect(serve(lambda channel, number: answer(channel, said, 127))))
    with pytest.raises(NoAgent, match="gw1: /usr/lib/dsnat/agent gave"):
        remote.ask({"do": "facts"}, deadline_s=5)


def test_a_gateway_behind_a_jump_host_has_its_own_pinned_key(serve: Serve, identity: Path) -> None:
    """The hop's key does not vouch for the gateway's."""
    double = serve()
    hop = Target("hop", "127.0.0.1", double.port, "root", double.public_key(), identity)
    target = Target("gw1", "127.0.0.1", 9, "root", double.public_key(), identity, 3.0, hop)
    with pytest.raises(Unreachable, match="cannot be reached from hop"):
        dial(target)
