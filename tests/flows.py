"""Many long TCP connections, each on its own inside address, and what becomes of every one of them.

Run inside a namespace: `python -m tests.flows serve ADDRESS PORT`, or `... hold FIRST COUNT SERVER PORT
PERIOD`. The server tells each connection the public address it sees, then echoes. The holder sends a byte on
each connection every PERIOD seconds. Commands on its standard input are answered with a line of JSON:

    mark      from now on counted: the connections that are up
    settled   what is heard counts from now on
    count     of the marked ones: kept (up, and heard from since), reset, silent (up, and not heard from)
    again     the marked ones that were reset or silent are opened anew; answers how many got through
    lost      public address -> number of marked ones that were reset
    where     public address -> number of connections that are up
    close     all of them
    open      all of them anew
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import socket
import sys
import time
from collections import Counter
from ipaddress import IPv4Address

IP_FREEBIND = 15


async def serve(address: str, port: int) -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(f"{writer.get_extra_info('peername')[0]}\n".encode())
        with contextlib.suppress(OSError):
            while data := await reader.read(64):
                writer.write(data)
        writer.close()

    server = await asyncio.start_server(echo, address, port, backlog=4096)
    async with server:
        await server.serve_forever()


class Flow:
    """One connection, opened once or again."""

    def __init__(self, source: str, server: tuple[str, int]) -> None:
        self.source, self.server = source, server
        self.public, self.heard, self.state = "", 0.0, "closed"
        self._writer: asyncio.StreamWriter | None = None
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> bool:
        s = socket.socket()
        s.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
        s.setblocking(False)
        s.bind((self.source, 0))
        try:
            await asyncio.wait_for(asyncio.get_running_loop().sock_connect(s, self.server), 20)
            reader, self._writer = await asyncio.open_connection(sock=s)
            self.public = (await asyncio.wait_for(reader.readline(), 20)).decode().strip()
        except (OSError, TimeoutError):
            s.close()
            self.state = "reset"
            return False
        self.heard, self.state = time.monotonic(), "up"
        self._task = asyncio.create_task(self._listen(reader))
        return True

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        try:
            while await reader.read(64):
                self.heard = time.monotonic()
        except OSError:
            self.state = "reset"
        else:
            self.state = "closed"

    def send(self) -> None:
        if self.state == "up" and self._writer is not None:
            try:
                self._writer.write(b".")
            except OSError:
                self.state = "reset"

    def close(self) -> None:
        self.state = "closed"
        if self._writer is not None:
            self._writer.close()
        if self._task is not None:
            self._task.cancel()


async def hold(first: str, count: int, server: tuple[str, int], period_s: float) -> None:
    flows = [Flow(str(IPv4Address(first) + n), server) for n in range(count)]
    gate = asyncio.Semaphore(64)

    async def one(flow: Flow) -> bool:
        async with gate:
            return await flow.open()

    opened = await asyncio.gather(*map(one, flows))
    say({"up": sum(opened), "of": count})

    async def beat() -> None:
        turn = 0
        while True:
            for flow in flows[turn::20]:
                flow.send()
            turn = (turn + 1) % 20
            await asyncio.sleep(period_s / 20)

    beating = asyncio.create_task(beat())
    marked: list[Flow] = []
    since = 0.0
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := (await reader.readline()).decode().strip():
        if line == "mark":
            marked, since = [flow for flow in flows if flow.state == "up"], time.monotonic()
            say({"marked": len(marked)})
        elif line == "settled":
            since = time.monotonic()
            say({})
        elif line == "count":
            say(
                {
                    "kept": sum(f.state == "up" and f.heard > since for f in marked),
                    "reset": sum(f.state == "reset" for f in marked),
                    "silent": sum(f.state == "up" and f.heard <= since for f in marked),
                }
            )
        elif line == "again":
            lost = [f for f in marked if f.state != "up" or f.heard <= since]
            for flow in lost:
                flow.close()
            say({"again": sum(await asyncio.gather(*map(one, lost))), "of": len(lost)})
        elif line == "lost":
            say(dict(Counter(flow.public for flow in marked if flow.state == "reset")))
        elif line == "where":
            say(dict(Counter(flow.public for flow in flows if flow.state == "up")))
        elif line == "close":
            for flow in flows:
                flow.close()
            say({})
        elif line == "open":
            say({"up": sum(await asyncio.gather(*map(one, flows)))})
    beating.cancel()


def say(value: object) -> None:
    print(json.dumps(value), flush=True)


def main(words: list[str]) -> None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    if words[0] == "serve":
        asyncio.run(serve(words[1], int(words[2])))
    else:
        asyncio.run(hold(words[1], int(words[2]), (words[3], int(words[4])), float(words[5])))


if __name__ == "__main__":
    main(sys.argv[1:])
