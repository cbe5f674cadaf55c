"""One SSH connection to one gateway. The only module that imports paramiko.

A gateway's host key is pinned: it stands in fleet.yaml, is compared byte for byte, and nothing else is
ever accepted, asked about or remembered; no known_hosts file is read. Every way to fail has a type of its
own, because an operator does something else about each. `run` is one round trip with a deadline and a
limit, and says when a command was lost while it ran: then nobody knows whether it had its effect, and the
caller must look.

paramiko's own waits are not all bounded and its threads are not ours to lock, so: one connection belongs
to one thread, the socket is ours (keepalive, TCP_USER_TIMEOUT), and each wait ends at a deadline of ours.
"""

from __future__ import annotations

import contextlib
import logging
import random
import shlex
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import paramiko
from paramiko.ssh_exception import IncompatiblePeer

from provision.model import Fleet
from provision.values import milliseconds

# paramiko's threads log what they also raise, and without a handler Python prints it, traceback and all: over
# a thousand lines while a gateway restarts. We say it in a sentence.
logging.getLogger("paramiko").addHandler(logging.NullHandler())

OUTPUT_MAX = 64 << 20
TRIES = 4  # of a connection that failed before anybody logged in


class GatewayError(Exception):
    """What went wrong with one gateway, in a sentence. `word` names it for programs."""

    word = "failed"


class Unreachable(GatewayError):
    word = "unreachable"


class ConnectTimeout(Unreachable):
    word = "timeout"


class Throttled(Unreachable):
    """The server is there and lets nobody in just now."""

    word = "throttled"

    def __init__(self, text: str, retry_after_s: float) -> None:
        super().__init__(text)
        self.retry_after_s = retry_after_s


class HostKeyMismatch(GatewayError):
    word = "host-key"

    def __init__(self, where: str, got: str, want: str) -> None:
        super().__init__(
            f"{where} shows another host key than fleet.yaml has: {got}, not {want}; if the "
            "gateway was replaced, "
            f"check the new key on its console and change host_key, otherwise somebody stands between"
        )
        self.got, self.want = got, want


class AuthFailed(GatewayError):
    word = "login"


class LostInFlight(GatewayError):
    """The connection ended while a command ran: it may or may not have had its effect."""

    word = "lost"


class RemoteTimeout(GatewayError):
    word = "slow"


class OutputLimit(GatewayError):
    word = "output"


@dataclass(frozen=True)
class Target:
    name: str
    address: str
    port: int
    user: str
    host_key: str
    identity: Path | None = None
    connect_timeout_s: float = 10.0
    jump: Target | None = None

    def __str__(self) -> str:
        return f"{self.address}:{self.port}"


def target_of(fleet: Fleet, name: str, directory: Path) -> Target:
    """`directory`: what a relative identity is relative to, the place of fleet.yaml."""
    gateway, ssh = fleet.gateways[name], fleet.ssh_of(name)

    def key(path: str | None) -> Path | None:
        return directory / Path(path).expanduser() if path is not None else None

    timeout_s = milliseconds(ssh.connect_timeout) / 1000
    jump = None
    if ssh.jump is not None:
        hop = fleet.jumps[ssh.jump]
        identity = key(hop.identity or ssh.identity)
        jump = Target(ssh.jump, hop.address, hop.port, hop.user, hop.host_key, identity, timeout_s)
    address = gateway.management.address
    return Target(name, address, ssh.port, ssh.user, gateway.host_key, key(ssh.identity), timeout_s, jump)


@dataclass(frozen=True)
class Completed:
    status: int
    output: str  # standard output and standard error


class Connection:
    """A logged-in connection. Use it from one thread and close it."""

    def __init__(self, transport: paramiko.Transport, target: Target, below: Connection | None) -> None:
        self._transport, self._name, self._below = transport, target.name, below
        self.timeout_s = target.connect_timeout_s

    def run(
        self,
        argv: list[str],
        *,
        stdin: bytes = b"",
        stream: Iterable[bytes] = (),
        deadline_s: float = 60.0,
        output_max: int = OUTPUT_MAX,
    ) -> Completed:
        """`stream` follows `stdin`, piece by piece: it may be larger than memory."""
        command, end = shlex.join(argv), time.monotonic() + deadline_s

        def left() -> float:
            return max(0.01, end - time.monotonic())

        slow = RemoteTimeout(f"{self._name}: no answer within {deadline_s:g} s")
        lost = LostInFlight(f"{self._name}: the connection ended while the gateway worked")
        try:
            channel = self._transport.open_session(timeout=left())
        except (paramiko.SSHException, EOFError, OSError) as error:
            raise LostInFlight(f"{self._name}: the connection ended: {error}") from error
        try:
            # One stream: two of them, read in turn, can wait for each other for ever.
            channel.set_combine_stderr(True)
            channel.settimeout(left())
            channel.exec_command(command)
            channel.sendall(stdin)
            for data in stream:
                if channel.closed or channel.recv_ready():
                    break  # it has answered already: it does not want the rest
                channel.settimeout(left())
                channel.sendall(data)
            channel.shutdown_write()
            parts: list[bytes] = []
            size = 0
            while True:
                channel.settimeout(left())
                data = channel.recv(65536)
                if not data:
                    break
                parts.append(data)
                size += len(data)
                if size > output_max:
                    raise OutputLimit(f"{self._name}: more than {output_max >> 20} MiB of output")
            if not channel.status_event.wait(left()):
                raise slow
            if channel.exit_status < 0:  # ended by a signal, or the connection is gone
                raise lost
            return Completed(channel.exit_status, b"".join(parts).decode(errors="replace"))
        except TimeoutError as error:
            raise slow from error
        except (paramiko.SSHException, EOFError, OSError) as error:
            raise lost from error
        finally:
            channel.close()

    def channel_to(self, address: str, port: int, timeout_s: float) -> paramiko.Channel:
        try:
            return self._transport.open_channel(
                "direct-tcpip", (address, port), ("127.0.0.1", 0), timeout=timeout_s
            )
        except (paramiko.SSHException, EOFError, OSError) as error:
            raise Unreachable(f"{address}:{port} cannot be reached from {self._name}: {error}") from error

    def close(self) -> None:
        self._transport.close()
        if self._below is not None:
            self._below.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def dial(target: Target) -> Connection:
    """A new connection, never a shared one. Tries again only what failed before the login."""
    for attempt in range(1, TRIES + 1):
        try:
            return _dial_once(target)
        except Throttled as throttled:
            if attempt == TRIES:
                raise
            # All of a fleet behind one jump host would otherwise come back at the same moment.
            time.sleep(throttled.retry_after_s * attempt * random.uniform(0.5, 1.5))
    raise AssertionError("unreachable")


def _dial_once(target: Target) -> Connection:
    end = time.monotonic() + target.connect_timeout_s
    below = dial(target.jump) if target.jump is not None else None
    try:
        if below is not None:
            sock: Any = below.channel_to(target.address, target.port, target.connect_timeout_s)
        else:
            sock = _connect(target)
        recorder = _Recorder(sock)
        transport = paramiko.Transport(recorder)  # type: ignore[arg-type]
        try:
            _log_in(transport, recorder, target, end)
        except BaseException:
            transport.close()
            raise
        return Connection(transport, target, below)
    except BaseException:
        if below is not None:
            below.close()
        raise


def _connect(target: Target) -> socket.socket:
    try:
        sock = socket.create_connection((target.address, target.port), timeout=target.connect_timeout_s)
    except TimeoutError as error:
        text = f"{target} does not answer within {target.connect_timeout_s:.0f} s"
        raise ConnectTimeout(f"{text}; is the gateway up, and its management address right?") from error
    except OSError as error:
        raise Unreachable(f"{target} cannot be reached: {error.strerror or error}") from error
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 15_000)
    return sock


def _log_in(transport: paramiko.Transport, recorder: _Recorder, target: Target, end: float) -> None:
    def left() -> float:
        return max(0.01, end - time.monotonic())

    kind, _, blob = target.host_key.partition(" ")
    transport.get_security_options().key_types = [kind]  # no other key can even be offered
    transport.banner_timeout = left()
    transport.auth_timeout = left()
    try:
        transport.start_client(timeout=left())  # returns also when time is over; the key is not there then
        shown = transport.get_remote_server_key()
    except IncompatiblePeer as error:
        if "host key" in str(error):
            raise HostKeyMismatch(str(target), "a key of another type", kind) from error
        raise Unreachable(f"{target} and this program have no common way to encrypt: {error}") from error
    except (paramiko.SSHException, EOFError, OSError) as error:
        if time.monotonic() >= end:
            raise ConnectTimeout(f"{target} does not speak SSH in time") from error
        raise _classify(error, bytes(recorder.first), target) from error
    if (shown.get_name(), shown.get_base64()) != (kind, blob.split()[0]):
        wanted = paramiko.PKey.from_type_string(kind, _decode(blob.split()[0]))
        raise HostKeyMismatch(str(target), shown.fingerprint, wanted.fingerprint)
    _authenticate(transport, target)


def _authenticate(transport: paramiko.Transport, target: Target) -> None:
    keys: list[paramiko.PKey] = []
    if target.identity is not None:
        keys = [_private_key(target.identity)]
    else:
        with contextlib.suppress(paramiko.SSHException, OSError):
            keys = list(paramiko.Agent().get_keys())
    if not keys:
        raise AuthFailed(
            f"no key to log in to {target.name} with; set ssh: identity or load one into the ssh agent"
        )
    for key in keys:
        try:
            transport.auth_publickey(target.user, key)
        except paramiko.AuthenticationException:
            continue
        except (paramiko.SSHException, EOFError, OSError) as error:
            raise Unreachable(f"{target}: the connection ended at the login: {error}") from error
        if transport.is_authenticated():
            return
    raise AuthFailed(f"{target.name} does not let {target.user} in with {_listed(target, len(keys))}")


def _private_key(path: Path) -> paramiko.PKey:
    try:
        return paramiko.PKey.from_path(path)
    except OSError as error:
        why = f"cannot be read ({error.strerror}); correct ssh: identity in the fleet file"
    except (paramiko.PasswordRequiredException, TypeError):  # the latter from the library below
        why = "has a passphrase; load it into the ssh agent, and leave ssh: identity out"
    except (paramiko.SSHException, paramiko.pkey.UnknownKeyType, ValueError):
        why = "is not a private key; correct ssh: identity in the fleet file"
    raise AuthFailed(f"the identity {path} {why}")


def _listed(target: Target, keys: int) -> str:
    return str(target.identity) if target.identity is not None else f"any of {keys} keys of the ssh agent"


def _decode(text: str) -> bytes:
    import base64

    return base64.b64decode(text)


def _classify(error: Exception, first: bytes, target: Target) -> GatewayError:
    """paramiko says "Error reading SSH protocol banner" for four causes. What the server sent tells them
    apart.
    """
    if isinstance(error, TimeoutError):
        return ConnectTimeout(f"{target} does not speak SSH in time")
    if b"Not allowed at this time" in first:
        return Throttled(f"{target} refuses this address for a while (too many failed logins from it)", 4.0)
    if first.startswith(b"SSH-"):
        return Unreachable(f"{target}: no SSH connection could be agreed on: {error}")
    if first:
        return Unreachable(f"{target} is not an SSH server: it says {first[:40]!r}")
    text = str(error)
    if "banner" in text or isinstance(error, (EOFError, ConnectionError)):
        return Throttled(f"{target} closed the connection at once (too many at a time?)", 0.5)
    return ConnectTimeout(f"{target} does not speak SSH in time: {text}")


class _Recorder:
    """A socket that remembers the first bytes it received."""

    def __init__(self, sock: Any) -> None:
        self._sock = sock
        self.first = bytearray()

    def recv(self, size: int) -> bytes:
        data: bytes = self._sock.recv(size)
        if len(self.first) < 256:
            self.first += data[: 256 - len(self.first)]
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)
