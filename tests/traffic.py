"""Real traffic through a gateway, judged by what the server saw.

    client 100.64.0.10 --- inside [ gateway ] outside --- server 198.51.100.10

`Servers` runs nginx, iperf3, dnsmasq and a tcpdump in the server's namespace. `send` runs curl, iperf3, dig,
ping and traceroute in the client's, and returns a `Report`: every connection with the public address and port
that the server logged for it, and one `Line` per promise with whether it was kept. Nothing is taken from the
gateway's word, except that a lost UDP datagram is excused when one of its drop counters has counted it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network

from tests.lab import Netns, Program, wait_until

CLIENT = "100.64.0.10"
SERVER = "198.51.100.10"
INSIDE = IPv4Network("100.64.0.0/10")
POOL = ("203.0.113.1", "203.0.113.2", "203.0.113.3", "203.0.113.4")
PAGE_BYTES = 20_000
NAME, NAME_ADDRESS = "gateway.test", "192.0.2.53"

NGINX = """\
daemon off; master_process off; user root; pid {dir}/nginx.pid; error_log {dir}/nginx-error.log;
events {{ worker_connections 512; }}
http {{
  log_format connection '$remote_addr $remote_port $body_bytes_sent $status';
  access_log {dir}/nginx-access.log connection;
  client_body_temp_path {dir}/tmp; proxy_temp_path {dir}/tmp; fastcgi_temp_path {dir}/tmp;
  uwsgi_temp_path {dir}/tmp; scgi_temp_path {dir}/tmp;
  keepalive_timeout 0;  # one connection per request
  server {{ listen {address}:80; root {dir}/www; }}
}}
"""


@dataclass(frozen=True)
class Connection:
    """One connection (or DNS query, or ping) as the server saw it."""

    service: str
    address: str
    port: int
    bytes: int
    lost: str = "-"


@dataclass(frozen=True)
class Line:
    """One promise: kept or not, and what was seen."""

    kept: bool
    promise: str
    seen: str


@dataclass(frozen=True)
class Report:
    connections: Sequence[Connection]
    lines: Sequence[Line]

    @property
    def right(self) -> bool:
        return all(line.kept for line in self.lines)

    def text(self) -> str:
        return f"{_http_table(self.connections)}\n{_other_table(self.connections)}\n{_verdicts(self.lines)}"


@dataclass
class Servers:
    """The server's side. Logs are files in the lab's directory, which everything here is read from."""

    space: Netns
    interface: str
    address: str = SERVER
    watch: Program = field(init=False)

    def start(self) -> None:
        directory = self.space.lab.directory
        (directory / "www").mkdir()
        (directory / "tmp").mkdir()
        (directory / "www/page").write_bytes(bytes(range(256)) * (PAGE_BYTES // 256 + 1))
        with (directory / "www/page").open("r+b") as page:
            page.truncate(PAGE_BYTES)
        conf = directory / "nginx.conf"
        conf.write_text(NGINX.format(dir=directory, address=self.address))
        early = str(directory / "nginx-error.log")
        nginx = self.space.start("nginx", "-p", str(directory), "-e", early, "-c", str(conf), log="nginx.log")
        dnsmasq = self.space.start(
            *("dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts"),
            *("--bind-interfaces", f"--listen-address={self.address}", f"--address=/{NAME}/{NAME_ADDRESS}"),
            *("--log-queries=extra", f"--log-facility={directory}/dnsmasq-queries.log"),
            *("--user=root", f"--pid-file={directory}/dnsmasq.pid"),
            log="dnsmasq.log",
        )
        # what no server logs: pings, probes of traceroute, and anything that came out untranslated
        watched = f"icmp or (udp and dst portrange 33434-33534) or src net {INSIDE}"
        self.watch = self.space.start(
            *("tcpdump", "-n", "-l", "--immediate-mode", "-i", self.interface, watched),
            log="watch.log",
            errors="watch-errors.log",
        )
        self.space.wait_for_listener(nginx, 80)
        self.space.wait_for_listener(dnsmasq, 53, udp=True)
        errors = directory / "watch-errors.log"
        wait_until("tcpdump to listen", lambda: "listening on" in errors.read_text())

    def http(self, count: int) -> list[Connection]:
        """The last `count` requests, in order; nginx logs a request after its last byte was sent."""
        path = self.space.lab.directory / "nginx-access.log"
        wait_until(f"{count} lines in {path}", lambda: len(path.read_text().splitlines()) >= count)
        rows = [line.split() for line in path.read_text().splitlines()[-count:]]
        return [
            Connection("HTTP", address, int(port), int(size))
            for address, port, size, status in rows
            if status == "200"
        ]

    def dns(self) -> list[Connection]:
        text = (self.space.lab.directory / "dnsmasq-queries.log").read_text()
        rows = re.findall(r"([\d.]+)/(\d+) query\[A\] (\S+) from", text)
        return [Connection("DNS", address, int(port), len(name) + 18) for address, port, name in rows]

    def watched(self, service: str, pattern: str, count: int) -> list[Connection]:
        """Lines of the tcpdump, one connection per end; groups of `pattern`: address, port, bytes."""

        def rows() -> list[tuple[str, str, str]]:
            found: list[tuple[str, str, str]] = re.findall(pattern, self.watch.text())
            return found

        wait_until(f"{count} packets of {service} at the server", lambda: len(rows()) >= count)
        total: Counter[tuple[str, int]] = Counter()
        for address, port, size in rows():
            total[address, int(port)] += int(size)
        return [Connection(service, *end, size) for end, size in total.items()]

    def untranslated(self) -> list[str]:
        """Lines about packets whose source is an inside address: there must be none, ever."""
        sources = re.findall(r"IP (\d+\.\d+\.\d+\.\d+)", self.watch.text())
        return [source for source in sources if IPv4Address(source) in INSIDE]


def send(
    client: Netns,
    servers: Servers,
    *,
    drops: Callable[[], Mapping[str, int]],
    requests: int = 40,
    pool: Sequence[str] = POOL,
    udp_mbit: float = 5,
    tcp_mbit: float = 0,
    seconds: int = 5,
    say: Callable[[str], None] = lambda _: None,
) -> Report:
    """Everything once. `tcp_mbit` 0 means as fast as it goes; `drops` gives the gateway's drops by reason."""
    seen: list[Connection] = []
    lines: list[Line] = []
    steps: Sequence[tuple[str, Callable[[], tuple[list[Connection], Line]]]] = (
        ("ping", lambda: _ping(client, servers)),
        (f"{requests} HTTP connections", lambda: _http(client, servers, requests, pool)),
        ("DNS", lambda: _dns(client, servers)),
        ("iperf3 TCP", lambda: _iperf_tcp(client, servers, tcp_mbit, seconds)),
        ("iperf3 UDP", lambda: _iperf_udp(client, servers, udp_mbit, seconds, drops)),
        ("traceroute", lambda: _traceroute(client, servers)),
    )
    for name, step in steps:
        say(name)
        connections, line = step()
        seen += connections
        lines.append(line)
    foreign = sorted({one.address for one in seen} - set(pool))
    lines.append(
        Line(
            not foreign,
            "every connection comes from the pool",
            ", ".join(foreign) or f"{len(seen)} of {len(seen)}",
        )
    )
    leaked = servers.untranslated()
    lines.append(Line(not leaked, "no inside address was seen outside", f"{len(leaked)} packets"))
    return Report(seen, lines)


def _ping(client: Netns, servers: Servers) -> tuple[list[Connection], Line]:
    count = 10
    text = client.run("ping", "-n", "-c", str(count), "-i", "0.2", "-W", "3", servers.address, check=False)
    match = re.search(r"(\d+) received", text)
    received = int(match[1]) if match else 0
    pattern = rf"IP ([\d.]+) > {servers.address}: ICMP echo request, id (\d+), seq \d+, length (\d+)"
    seen = servers.watched("ping", pattern, received) if received else []
    seen = [
        Connection(one.service, one.address, one.port, one.bytes, f"{count - received}/{count}")
        for one in seen
    ]
    return seen, Line(received == count, "ping is answered", f"{received} of {count}")


def _http(
    client: Netns, servers: Servers, requests: int, pool: Sequence[str]
) -> tuple[list[Connection], Line]:
    url = f"http://{servers.address}/page?[1-{requests}]"
    sizes = client.run(
        *(
            "curl",
            "-sS",
            "--max-time",
            "20",
            "-o",
            "/dev/null",
            "-w",
            r"%{http_code} %{size_download}\n",
            url,
        ),
        timeout_s=120,
        check=False,
    ).splitlines()
    whole = sum(line == f"200 {PAGE_BYTES}" for line in sizes)
    seen = servers.http(requests) if whole == requests else []
    share = Counter(one.address for one in seen)
    even = all(share[address] * len(pool) == requests for address in pool)
    in_turn = all(a.address == b.address for a, b in zip(seen, seen[len(pool) :], strict=False))
    text = f"{whole} of {requests} whole, {' + '.join(str(share[address]) for address in pool)}"
    promise = f"{requests} connections in a row take the {len(pool)} addresses in turn"
    return seen, Line(whole == requests and even and in_turn, promise, text)


def _dns(client: Netns, servers: Servers) -> tuple[list[Connection], Line]:
    queries, right = 4, 0
    for _ in range(queries):
        text = client.run("dig", "+short", "+tries=2", "+time=5", f"@{servers.address}", NAME, check=False)
        right += text.strip() == NAME_ADDRESS
    return servers.dns(), Line(right == queries, "DNS queries are answered", f"{right} of {queries}")


def _iperf(client: Netns, servers: Servers, name: str, *options: str) -> tuple[dict[str, object], str]:
    server = servers.space.start(
        *("iperf3", "-s", "-1", "-J", "-B", servers.address),
        log=f"{name}-server.json",
        errors=f"{name}-server.log",
    )
    servers.space.wait_for_listener(server, 5201)
    said = client.run("iperf3", "-c", servers.address, "-J", *options, timeout_s=90, check=False)
    (client.lab.directory / f"{name}-client.json").write_text(said)
    try:
        error = json.loads(said).get("error", "")
        if error:
            return {}, error
        server.wait(timeout_s=20)
        answer: dict[str, object] = json.loads(server.text())
    except ValueError:
        return {}, f"no JSON from iperf3; see {client.lab.directory}/{name}-*"
    return answer, ""


def _iperf_ends(result: Mapping[str, object], service: str, size: int, lost: str) -> list[Connection]:
    start = result["start"]
    assert isinstance(start, dict)
    control, data = start["accepted_connection"], start["connected"]
    return [Connection(f"{service} control", control["host"], control["port"], 0)] + [
        Connection(service, one["remote_host"], one["remote_port"], size, lost) for one in data
    ]


def _iperf_tcp(client: Netns, servers: Servers, mbit: float, seconds: int) -> tuple[list[Connection], Line]:
    rate = ["-b", f"{mbit:g}M"] if mbit else []
    result, error = _iperf(client, servers, "iperf3-tcp", "-t", str(seconds), *rate)
    promise = "iperf3 TCP gets through"
    if error:
        return [], Line(False, promise, error)
    end = result["end"]
    assert isinstance(end, dict)
    got = end["sum_received"]
    seen = _iperf_ends(result, "iperf3 TCP", int(got["bytes"]), "-")
    return seen, Line(got["bytes"] > 0, promise, f"{got['bits_per_second'] / 1e6:.1f} Mbit/s")


def _iperf_udp(
    client: Netns, servers: Servers, mbit: float, seconds: int, drops: Callable[[], Mapping[str, int]]
) -> tuple[list[Connection], Line]:
    before = drops()
    options = ("-u", "-b", f"{mbit:g}M", "-l", "1200", "-t", str(seconds))
    result, error = _iperf(client, servers, "iperf3-udp", *options)
    promise = f"iperf3 UDP at {mbit:g} Mbit/s loses nothing that no counter names"
    if error:
        return [], Line(False, promise, error)
    named = {reason: n - before.get(reason, 0) for reason, n in drops().items() if n > before.get(reason, 0)}
    end = result["end"]
    assert isinstance(end, dict)
    got = end["sum"]
    lost, sent = int(got["lost_packets"]), int(got["packets"])
    seen = _iperf_ends(result, "iperf3 UDP", (sent - lost) * 1200, f"{lost}/{sent}")
    names = ", ".join(f"{reason} {n}" for reason, n in named.items()) or "no drop counted"
    return seen, Line(sent > 0 and lost <= sum(named.values()), promise, f"{lost} of {sent} lost, {names}")


def _traceroute(client: Netns, servers: Servers) -> tuple[list[Connection], Line]:
    text = client.run(
        "traceroute", "-n", "-q", "1", "-N", "1", "-w", "3", "-m", "5", servers.address, check=False
    )
    hops = re.findall(r"^ *\d+  (\S+)", text, re.MULTILINE)
    right = (
        len(hops) == 2 and hops[0] != "*" and IPv4Address(hops[0]) in INSIDE and hops[1] == servers.address
    )
    pattern = rf"IP ([\d.]+)\.(\d+) > {servers.address}\.33\d\d\d: UDP, length (\d+)"
    seen = servers.watched("traceroute", pattern, 1) if right else []
    return seen, Line(right, "traceroute shows the gateway, then the server", " > ".join(hops) or "no hop")


def _http_table(seen: Sequence[Connection]) -> str:
    """One row per turn of the round robin, one column per public address: the ports that the server saw."""
    http = [one for one in seen if one.service == "HTTP"]
    addresses = sorted({one.address for one in http}, key=IPv4Address)
    rows: list[dict[str, int]] = []
    for one in http:
        if not rows or one.address in rows[-1]:
            rows.append({})
        rows[-1][one.address] = one.port
    head = f"HTTP, {len(http)} connections of {PAGE_BYTES} bytes in order; source port by public address:"
    lines = ["  turn " + "".join(f"{address:>16}" for address in addresses)]
    for number, row in enumerate(rows, 1):
        lines.append(f"  {number:>4} " + "".join(f"{row.get(address, '-'):>16}" for address in addresses))
    total = (f"{sum(one.address == address for one in http):>16}" for address in addresses)
    return "\n".join([head, *lines, "  sum  " + "".join(total)])


def _other_table(seen: Sequence[Connection]) -> str:
    lines = [f"  {'service':<20}{'public address':<18}{'port or id':>10}{'bytes':>12}{'lost':>12}"]
    for one in seen:
        if one.service != "HTTP":
            lines.append(f"  {one.service:<20}{one.address:<18}{one.port:>10}{one.bytes:>12}{one.lost:>12}")
    return "\n".join(["The rest, as the server saw it:", *lines])


def _verdicts(lines: Sequence[Line]) -> str:
    return "\n".join(f"  {'ok  ' if line.kept else 'FAIL'}  {line.promise}: {line.seen}" for line in lines)
