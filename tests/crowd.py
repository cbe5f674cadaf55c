"""A crowd of connections through a gateway, and what becomes of each: idle, active TCP, UDP streams, pings.

Two processes, so that 11,000 connections fit the descriptors that a process may have. `Crowd` starts both:

    python -m tests.crowd serve ADDRESS PORT          echoes; tells UDP streams the source that it sees
    python -m tests.crowd hold ADDRESS PORT IDLE ACTIVE STREAMS PINGS PERIOD_S

The holder takes commands on its standard input and answers each with a line of JSON:

    mark        the measure of darkness begins anew
    dark        since then the longest time without an answer: worst UDP stream, ping, active connection; and
                how long the worst stream has been silent by now, how many active ones have not been heard
    ask         a byte on every TCP connection, and back; how many are lost (reset, ended, silent)
    more N      N idle connections more

Darkness is per stream, so a gap of one of them is seen. An active connection asks again PERIOD_S after
each answer, a stream each STREAM_S whether or not the last one was answered; a stream whose source has
changed at the server has lost its session, and counts as moved.
"""

from __future__ import annotations

import json
import os
import resource
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.lab import LabError, Netns

ROOT = Path(__file__).resolve().parents[1]
PERIOD_S = 0.5  # unless told
STREAM_S = 0.01
AT_ONCE = 64  # connections being opened
SILENT_S = 60


def more_descriptors() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


# --- the server -----------------------------------------------------------------------------------


def serve(address: str, port: int) -> None:
    more_descriptors()
    listener = socket.create_server((address, port), backlog=4096)
    listener.setblocking(False)
    streams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    streams.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    streams.bind((address, port))
    streams.setblocking(False)
    poll = select.epoll()
    poll.register(listener, select.EPOLLIN)
    poll.register(streams, select.EPOLLIN)
    open_ones: dict[int, socket.socket] = {}
    while True:
        for fd, _ in poll.poll():
            if fd == listener.fileno():
                with suppress(BlockingIOError):
                    while True:
                        one, _ = listener.accept()
                        one.setblocking(False)
                        open_ones[one.fileno()] = one
                        poll.register(one, select.EPOLLIN)
            elif fd == streams.fileno():
                with suppress(BlockingIOError):
                    while True:
                        data, who = streams.recvfrom(100)
                        streams.sendto(data[:2] + f"{who[0]}:{who[1]}".encode(), who)
            else:
                try:
                    data = open_ones[fd].recv(1000)
                    if data:
                        open_ones[fd].send(data)
                except BlockingIOError:
                    continue
                except OSError:
                    data = b""
                if not data:
                    poll.unregister(fd)
                    open_ones.pop(fd).close()


# --- the holder -----------------------------------------------------------------------------------


@dataclass
class Line:
    """One connection or stream, and its darkness."""

    kind: str  # "idle", "active", "stream", "ping"
    heard_s: float
    gap_s: float = 0.0
    seen_as: bytes = b""  # a stream's source, as the server sees it

    def hears(self, now_s: float, since_s: float) -> None:
        begun_s = max(self.heard_s, since_s)
        self.gap_s = max(self.gap_s, now_s - begun_s)
        self.heard_s = now_s

    def worst(self, now_s: float, since_s: float) -> float:
        """Also what has not ended yet counts."""
        return max(self.gap_s, now_s - max(self.heard_s, since_s))


def checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    total += total >> 16
    return 0xFFFF - (total & 0xFFFF)


class Holder:
    def __init__(self, server: tuple[str, int], period_s: float) -> None:
        self.server, self.period_s = server, period_s
        self.poll = select.epoll()
        self.sockets: dict[int, socket.socket] = {}
        self.lines: dict[int, Line] = {}
        self.pings: dict[int, Line] = {}  # by identifier
        self.ping_socket: socket.socket | None = None
        self.due: list[tuple[float, int]] = []  # active ones, in the order in which they ask again
        self.asked: set[int] = set()
        self.lost: list[str] = []
        self.moved = 0
        self.since_s = time.monotonic()
        self.streams_due_s = 0.0
        self.number = 0

    def open(self, idle: int, active: int) -> int:
        """Opens them, `AT_ONCE` at a time; what fails is tried once more by TCP itself. How many are up."""
        wanted = ["idle"] * idle + ["active"] * active
        opening: dict[int, tuple[socket.socket, str]] = {}
        up = 0
        poll = select.epoll()
        end_s = time.monotonic() + 120
        while (wanted or opening) and time.monotonic() < end_s:
            while wanted and len(opening) < AT_ONCE:
                one = socket.socket()
                one.setblocking(False)
                one.connect_ex(self.server)
                opening[one.fileno()] = (one, wanted.pop())
                poll.register(one, select.EPOLLOUT)
            for fd, _ in poll.poll(0.5):
                one, kind = opening.pop(fd)
                poll.unregister(fd)
                error = one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if error:
                    self.lost.append(f"not opened: {os.strerror(error)}")
                    one.close()
                    continue
                up += 1
                self.sockets[fd] = one
                self.lines[fd] = Line(kind, time.monotonic())
                self.poll.register(one, select.EPOLLIN)
                if kind == "active":
                    self.due.append((time.monotonic() + self.period_s * (up % 100) / 100, fd))
        self.due.sort()
        self.lost += ["not opened in two minutes"] * (len(wanted) + len(opening))
        return up

    def open_streams(self, streams: int, pings: int) -> None:
        for number in range(streams):
            one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            one.connect(self.server)
            one.setblocking(False)
            self.sockets[one.fileno()] = one
            self.lines[one.fileno()] = Line("stream", time.monotonic())
            self.poll.register(one, select.EPOLLIN)
            self.number += number == 0
        if pings:
            self.ping_socket = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
            self.ping_socket.setblocking(False)
            self.poll.register(self.ping_socket, select.EPOLLIN)
            for number in range(pings):
                self.pings[(os.getpid() + number) & 0xFFFF] = Line("ping", time.monotonic())

    def lose(self, fd: int, why: str) -> None:
        self.lost.append(f"{self.lines[fd].kind}: {why}")
        self.poll.unregister(fd)
        self.sockets.pop(fd).close()
        self.lines.pop(fd)
        self.asked.discard(fd)

    def send(self, now_s: float) -> None:
        turn = 0
        while turn < len(self.due) and self.due[turn][0] <= now_s:
            fd = self.due[turn][1]
            turn += 1
            if fd in self.lines:
                try:
                    self.sockets[fd].send(b"?")
                except OSError as error:
                    self.lose(fd, str(error))
        del self.due[:turn]
        if now_s < self.streams_due_s:
            return
        self.streams_due_s = max(self.streams_due_s + STREAM_S, now_s)
        self.number = (self.number + 1) & 0xFFFF
        for fd, line in self.lines.items():
            if line.kind == "stream":
                with suppress(OSError):  # no route for a moment, or no room
                    self.sockets[fd].send(struct.pack("!H", self.number))
        for identifier in self.pings:
            body = struct.pack("!HHHHH", 0x0800, 0, identifier, self.number, 0)
            body = body[:2] + struct.pack("!H", checksum(body)) + body[4:]
            with suppress(OSError):
                assert self.ping_socket
                self.ping_socket.sendto(body, (self.server[0], 0))

    def hear_ping(self, now_s: float) -> None:
        assert self.ping_socket
        with suppress(OSError):
            while True:
                packet = self.ping_socket.recv(200)
                header = (packet[0] & 15) * 4
                if packet[header] == 0 and len(packet) >= header + 8:
                    line = self.pings.get(int.from_bytes(packet[header + 4 : header + 6], "big"))
                    if line:
                        line.hears(now_s, self.since_s)

    def hear(self, fd: int, now_s: float) -> None:
        if self.ping_socket and fd == self.ping_socket.fileno():
            self.hear_ping(now_s)
            return
        line = self.lines.get(fd)
        if not line:
            return
        try:
            data = self.sockets[fd].recv(1000)
        except BlockingIOError:
            return
        except OSError as error:
            if line.kind != "stream":  # a stream only hears that nobody was there for a moment
                self.lose(fd, str(error))
            return
        if line.kind == "stream":
            if line.seen_as and data[2:] != line.seen_as:
                self.moved += 1
            line.seen_as = data[2:]
        elif not data:
            self.lose(fd, "ended by the other side")
            return
        line.hears(now_s, self.since_s)
        self.asked.discard(fd)
        if line.kind == "active":
            self.due.append((now_s + self.period_s, fd))

    def round(self) -> None:
        for fd, _ in self.poll.poll(0.002):
            if fd == 0:
                line = sys.stdin.readline()
                if not line:
                    raise SystemExit(0)
                print(json.dumps(self.command(line.split())), flush=True)
            else:
                self.hear(fd, time.monotonic())
        self.send(time.monotonic())

    def command(self, words: list[str]) -> dict[str, Any]:
        now_s = time.monotonic()
        match words:
            case ["mark"]:
                self.since_s = now_s
                for line in [*self.lines.values(), *self.pings.values()]:
                    line.gap_s = 0.0
                return {}
            case ["dark"]:

                def worst(kind: str) -> float:
                    every = [*self.lines.values(), *self.pings.values()]
                    gaps = [one.worst(now_s, self.since_s) for one in every if one.kind == kind]
                    return round(max(gaps, default=0.0), 3)

                silent = max(
                    (now_s - one.heard_s for one in self.lines.values() if one.kind == "stream"), default=0
                )
                said = {kind: worst(kind) for kind in ("stream", "ping", "active")}
                waits = sum(one.heard_s < self.since_s for one in self.lines.values() if one.kind == "active")
                return said | {"silent": round(silent, 3), "waits": waits}
            case ["ask"]:
                self.ask()
                tcp = sum(line.kind in ("idle", "active") for line in self.lines.values())
                return {"up": tcp, "lost": len(self.lost), "why": self.lost[:3], "moved": self.moved}
            case ["more", count]:
                return {"up": self.open(int(count), 0)}
        raise SystemExit(f"unknown command {words}")

    def ask(self) -> None:
        self.asked = set()
        for fd, line in list(self.lines.items()):
            if line.kind == "idle":
                try:
                    self.sockets[fd].send(b"?")
                    self.asked.add(fd)
                except OSError as error:
                    self.lose(fd, str(error))
            elif line.kind == "active":
                self.asked.add(fd)
        end_s = time.monotonic() + SILENT_S
        while self.asked and time.monotonic() < end_s:
            for fd, _ in self.poll.poll(0.002):
                if fd != 0:
                    self.hear(fd, time.monotonic())
            self.send(time.monotonic())
        for fd in list(self.asked):
            self.lose(fd, f"silent for {SILENT_S} s")


def hold(server: tuple[str, int], period_s: float, idle: int, active: int, streams: int, pings: int) -> None:
    more_descriptors()
    holder = Holder(server, period_s)
    up = holder.open(idle, active)
    holder.open_streams(streams, pings)
    print(json.dumps({"up": up}), flush=True)
    holder.poll.register(0, select.EPOLLIN)
    while True:
        holder.round()


# --- from a test ----------------------------------------------------------------------------------


class Crowd:
    """The two processes, in the namespaces of a client and a server."""

    def __init__(
        self,
        client: Netns,
        server: Netns,
        address: str,
        *,
        port: int = 7100,
        idle: int,
        active: int,
        streams: int = 10,
        pings: int = 2,
        period_s: float = PERIOD_S,
    ) -> None:
        self.of = idle + active
        self.server = server.start(
            "env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "tests.crowd", "serve", address, str(port),
            log="crowd-server.log",
        )  # fmt: skip
        server.wait_for_listener(self.server, port)
        words = ("hold", address, *map(str, (port, idle, active, streams, pings, period_s)))
        self.process = subprocess.Popen(
            client.argv("env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "tests.crowd", *words),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        client.lab.undo.callback(self.close)
        up = self._answer()["up"]
        if up != self.of:
            raise LabError(f"only {up} of {self.of} connections could be opened")

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise LabError("the holder of connections ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def say(self, command: str) -> dict[str, Any]:
        assert self.process.stdin
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        if self.process.stdin:
            with suppress(OSError):
                self.process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self.process.kill()


def main(words: list[str]) -> None:
    jobs: dict[str, Callable[[], None]] = {
        "serve": lambda: serve(words[1], int(words[2])),
        "hold": lambda: hold((words[1], int(words[2])), float(words[7]), *map(int, words[3:7])),
    }
    jobs[words[0]]()


if __name__ == "__main__":
    main(sys.argv[1:])
