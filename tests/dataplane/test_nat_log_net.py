"""The NAT log at real collectors: what nfcapd, nfacctd and rsyslog wrote down is what left by the outside
port, as sets, also when the collector is restarted in between.

The collectors run in the gateway's namespace, on 127.0.0.1. tests/flood.py makes the sessions; each datagram
carries its own source. The outside port is DPDK's driver for captures: what leaves is in a file, which alone
is the truth and knows nothing of the log. (A wire with tcpdump behind it takes three times the time of the
engine, and is what would be measured on a small machine.) `--log-sessions 1000000 --log-rate 100000` is the
run whose figure stands in dataplane/README.md.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import select
import socket
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from tests import ipfix
from tests.flood import REMOTE
from tests.gateway import DPDK_INTERFACES, mac_of, new_gateway
from tests.lab import CLONE_NEWNET, Lab, Netns, wait_until

pytestmark = pytest.mark.net
ROOT = Path(__file__).resolve().parents[2]
COLLECTOR = "127.0.0.1:4739"

# (host, its port, public address, its port)
Mapping = tuple[str, int, str, int]


class Site:
    """A gateway, the flood in front of it and a capture behind it. At a high rate the generator and the
    engine's threads go before all others, as they do on CPUs of their own; the collector has what is left.
    """

    def __init__(self, lab: Lab, program: Path, rest: str, sessions: int, *, first: bool = False) -> None:
        self.first, self.pcap = first, lab.directory / "outside.pcap"
        # a third of a second of 100,000 packets: a worker that a busy machine keeps waiting must lose none
        ports = DPDK_INTERFACES.replace("iface=vin", "iface=vin,blocksz=65536,framesz=2048,framecnt=32768")
        ports = ports.replace("net_af_packet1,iface=vout", f"net_pcap1,tx_pcap={self.pcap}")
        text = f"engine: {{workers: 1, max_sessions: {max(sessions * 2, 100_000)}}}\n{ports}{rest}"
        self.gateway = new_gateway(lab, program, text)
        for task in Path(f"/proc/{self.gateway.pid()}/task").iterdir() if first else ():
            os.sched_setscheduler(int(task.name), os.SCHED_FIFO, os.sched_param(1))
        space = self.gateway.space
        space.ip(f"neighbour replace {REMOTE} lladdr 02:00:00:00:00:14 dev outside0 nud permanent")
        self.mac = mac_of(space, "inside0")
        self.client, self.space = self.gateway.client, space
        self.directory = lab.directory
        self.sent = 0

    def flood(self, count: int, rate: int) -> str:
        argv = (sys.executable, "-m", "tests.flood", "eth0", self.mac)
        figures = map(str, (count, rate, self.sent, "realtime" if self.first else ""))
        env = ("env", f"PYTHONPATH={ROOT}")
        said = self.client.run(*env, *argv, *figures, timeout_s=60 + 3 * count / rate)
        self.sent += count
        return said

    def log(self) -> dict[str, int]:
        """One collector's figures, and the sums of the workers' events."""
        log = self.gateway.show("counters")["nat_log"]
        one: dict[str, int] = dict(log["collectors"][0])
        for key in ("told", "lost"):
            one[key] = sum(sum(worker[key].values()) for worker in log["workers"])
        return one

    def settle(self, *, deadline_s: float = 60) -> dict[str, int]:
        """When every session has ended and the log has gone out."""
        wait_until(
            "all sessions to end", lambda: self.gateway.counters()["sessions"] == 0, deadline_s=deadline_s
        )

        def is_out() -> bool:
            log = self.log()
            return log["records_sent"] + log["records_lost"] == log["told"]

        wait_until("the log to go out", is_out, deadline_s=deadline_s)
        return self.log()

    def truth(self) -> Counter[Mapping]:
        """What left by the outside port. The gateway ends with it: then the file is complete."""
        self.gateway.close()
        return Counter(mappings(self.pcap.read_bytes()))


def mappings(pcap: bytes) -> Iterable[Mapping]:
    assert pcap[:4] == b"\x4d\x3c\xb2\xa1", "a little-endian pcap with nanoseconds"
    at = 24
    while at < len(pcap):
        (length,) = struct.unpack_from("<I", pcap, at + 8)
        packet = pcap[at + 16 + 14 : at + 16 + length]
        public, port = str(IPv4Address(packet[12:16])), int.from_bytes(packet[20:22], "big")
        host, host_port = struct.unpack_from(">IH", packet, 28)
        yield str(IPv4Address(host)), host_port, public, port
        at += 16 + length


# ---- collectors ----


class Nfcapd:
    def __init__(self, site: Site) -> None:
        self.site, self.starts = site, 0
        self.start()

    def start(self) -> None:
        self.starts += 1
        self.flows = self.site.directory / f"flows-{self.starts}"
        self.flows.mkdir()
        argv = (
            "nfcapd",
            "-b",
            "127.0.0.1",
            "-p",
            "4739",
            "-B",
            "8388608",
            "-t",
            "86400",
            "-w",
            str(self.flows),
        )
        self.program = self.site.space.start(*argv, log=f"nfcapd-{self.starts}.log")
        wait_until("nfcapd to listen", lambda: "Startup nfcapd" in self.program.text())

    def stop(self) -> None:
        self.program.process.terminate()
        self.program.wait(timeout_s=20)

    def records(self, event: int) -> Counter[Mapping]:
        """The records of all its lives with this natEvent."""
        found: Counter[Mapping] = Counter()
        for number in range(1, self.starts + 1):
            flows = str(self.site.directory / f"flows-{number}")
            form = "fmt:%sa %sp %nsa %nsp"
            argv = ("nfdump", "-q", "-6", "-R", flows, "-o", form, f"nat event == {event}")
            text = self.site.space.run(*argv, timeout_s=120)
            for line in text.splitlines():
                host, host_port, public, port = line.split()
                found[host, int(host_port), public, int(port)] += 1
        return found


class Nfacctd:
    """pmacct's collector; it prints what it has every second."""

    CONFIG = """\
daemonize: false
nfacctd_ip: 127.0.0.1
nfacctd_port: 4739
plugins: print
aggregate: src_host, src_port, post_nat_src_host, post_nat_src_port, nat_event, flows
print_output: csv
print_output_file: {output}
print_output_file_append: true
print_refresh_time: 1
print_cache_entries: 100003
"""

    def __init__(self, site: Site) -> None:
        self.output = site.directory / "nfacctd.csv"
        config = site.directory / "nfacctd.conf"
        config.write_text(self.CONFIG.format(output=self.output))
        self.program = site.space.start("nfacctd", "-f", str(config), log="nfacctd.log")
        wait_until("nfacctd to listen", lambda: "waiting for NetFlow/IPFIX data" in self.program.text())

    def records(self, event: int) -> Counter[Mapping]:
        found: Counter[Mapping] = Counter()
        for line in self.output.read_text().splitlines() if self.output.exists() else ():
            cells = line.split(",")
            if cells[0] == "SRC_IP" or cells[4] != str(event):
                continue
            found[cells[0], int(cells[1]), cells[2], int(cells[3])] += int(cells[-2])
        return found


class Rsyslogd:
    """It parses RFC 5424 itself; what it writes down is its own idea of message id and structured data."""

    CONFIG = """\
global(workDirectory="{directory}")
module(load="imudp")
module(load="imtcp")
input(type="imudp" address="127.0.0.1" port="514" rcvbufSize="8m")
input(type="imtcp" address="127.0.0.1" port="514")
template(name="parsed" type="string" string="%app-name% %msgid% %structured-data%\\n")
action(type="omfile" file="{output}" template="parsed")
"""

    def __init__(self, site: Site) -> None:
        self.output = site.directory / "syslog"
        config = site.directory / "rsyslog.conf"
        config.write_text(self.CONFIG.format(directory=site.directory, output=self.output))
        pid = str(site.directory / "rsyslog.pid")
        self.program = site.space.start("rsyslogd", "-n", "-f", str(config), "-i", pid, log="rsyslogd.log")
        wait_until("rsyslogd to listen", lambda: ":514" in site.space.run("ss", "-Hltn"))

    def records(self, what: str) -> Counter[Mapping]:
        found: Counter[Mapping] = Counter()
        form = re.compile(
            rf'dsnatd {what} \[nat@32473 pool="public" protocol="udp" host="(\S+)" hostPort="(\d+)" '
            r'public="(\S+)" publicPort="(\d+)" worker="0"\]\[meta sequenceId="\d+"\]'
        )
        for line in self.output.read_text().splitlines() if self.output.exists() else ():
            match = form.fullmatch(line)
            if match:
                found[match[1], int(match[2]), match[3], int(match[4])] += 1
        return found


class TcpCollector:
    """Listens in the site's namespace and reads IPFIX by the book; may be closed and opened again."""

    def __init__(self, site: Site) -> None:
        self.reader = ipfix.Reader()
        self.streams = 0
        self.socket = listen_in(site.space)
        self.client: socket.socket | None = None
        self.rest = b""

    def serve(self) -> bool:
        """Reads what is there."""
        if self.client is None:
            if not select.select([self.socket], [], [], 0.2)[0]:
                return False
            self.client = self.socket.accept()[0]
            self.client.setblocking(False)
            self.rest = b""
            self.streams += 1
            self.reader.templates.clear()  # they are those of a connection
        with suppress(BlockingIOError):
            while data := self.client.recv(1 << 20):
                self.rest = self.reader.read(self.rest + data)
        return True

    def hang_up(self) -> None:
        assert self.client is not None
        self.client.close()
        self.client = None

    def records(self, event: int) -> Counter[Mapping]:
        """Each once: a connection that broke may bring the last messages again."""
        return Counter(
            {
                (one["source"], one["source_port"], one["post_source"], one["post_source_port"])
                for one in self.reader.records
                if one["event"] == event
            }
        )


def listen_in(space: Netns) -> socket.socket:
    """A TCP socket at COLLECTOR in that namespace. Only this thread visits it, and comes back."""
    with Path(f"/run/netns/{space.name}").open() as there, Path("/proc/thread-self/ns/net").open() as here:
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.setns(there.fileno(), CLONE_NEWNET) == 0
        try:
            made = socket.create_server(("127.0.0.1", 4739))
        finally:
            assert libc.setns(here.fileno(), CLONE_NEWNET) == 0
    return made


# ---- tests ----


def rest(logging: str, pool: str = "", timeouts: str = "udp_one_way: 2s") -> str:
    return (
        f"pools: [{{name: public, addresses: [203.0.113.1-203.0.113.16]{pool}}}]\n"
        "zones: [{source: 100.64.0.0/10, pool: public}]\n"
        f"timeouts: {{{timeouts}}}\n"
        f"logging: [{{{logging}}}]\n"
    )


@pytest.fixture
def sessions(request: pytest.FixtureRequest) -> int:
    value: int = request.config.getoption("--log-sessions")
    return value


@pytest.fixture
def rate(request: pytest.FixtureRequest) -> int:
    value: int = request.config.getoption("--log-rate")
    return value


def fast(program: Callable[[str], Path], rate: int) -> Path:
    """The release build when it is about speed."""
    built = program("dsnatd")
    return built if rate <= 20_000 else built.parents[1] / "engine/dsnatd"


@pytest.mark.timeout(900)
def test_rfc8158_log4_nfcapd_has_every_session_also_across_its_restart(
    lab: Lab, program: Callable[[str], Path], sessions: int, rate: int
) -> None:
    text = rest(f'protocol: ipfix, collector: "{COLLECTOR}"')
    site = Site(lab, fast(program, rate), text, sessions, first=rate > 20_000)
    nfcapd = Nfcapd(site)
    said = [site.flood(sessions // 2, rate)]
    first = site.settle()
    assert first["records_lost"] == first["records_refused"] == first["lost"] == 0
    nfcapd.stop()
    said.append(site.flood(sessions // 10, rate))
    wait_until("the engine to notice", lambda: not site.log()["up"])
    nfcapd.start()
    said.append(site.flood(sessions // 2, rate))
    end = site.settle()
    created = site.gateway.counters()["sessions_created"]
    nfcapd.stop()
    truth = site.truth()
    begun, ended = nfcapd.records(4), nfcapd.records(5)
    print(f"{len(truth)} sessions, {'; '.join(said)}; {json.dumps(end)}")
    assert created == len(truth) == sum(truth.values())
    assert begun <= truth
    assert ended <= truth
    missing = 2 * len(truth) - sum(begun.values()) - sum(ended.values())
    assert end["told"] == 2 * len(truth)
    assert end["told"] == end["records_sent"] + end["records_lost"]
    assert missing == end["records_lost"] + end["records_refused"] + end["lost"]
    assert missing < 64 * 54, "more than one system call's messages were lost in a restart"


EIM = ", mapping: endpoint-independent"


def test_rfc8158_log5_nfacctd_has_one_end_for_each_mapping(lab: Lab, program: Callable[[str], Path]) -> None:
    text = rest(f'protocol: ipfix, collector: "{COLLECTOR}"', EIM, "udp_one_way: 1s, hold: 1s")
    site = Site(lab, program("dsnatd"), text, 2000)
    nfacctd = Nfacctd(site)
    site.flood(2000, 2000)
    end = site.settle()
    wait_until("every mapping to be told", lambda: site.log()["told"] == 4000)
    wait_until(
        "nfacctd to have them",
        lambda: sum(nfacctd.records(8).values()) + sum(nfacctd.records(9).values()) == 4000,
    )
    truth = site.truth()
    assert len(truth) == 2000
    assert nfacctd.records(8) == truth
    assert nfacctd.records(9) == truth
    assert end["records_lost"] == end["records_refused"] == end["lost"] == 0


@pytest.mark.parametrize("transport", ["udp", "tcp"])
def test_rsyslog_reads_every_line_from_the_reload_on_that_names_it(
    lab: Lab, program: Callable[[str], Path], transport: str
) -> None:
    text = rest(f'protocol: syslog, transport: {transport}, collector: "127.0.0.1:514"')
    before, _, _ = text.partition("logging:")
    site = Site(lab, program("dsnatd"), before, 2000)
    assert site.gateway.show("counters")["nat_log"] == {"workers": [], "collectors": []}
    rsyslogd = Rsyslogd(site)
    file = site.gateway.file
    file.write_text(file.read_text() + text.removeprefix(before))
    site.gateway.ask(cmd="reload")
    site.flood(2000, 2000)
    end = site.settle()
    wait_until(
        "rsyslogd to have them",
        lambda: (
            sum((rsyslogd.records("session-create") + rsyslogd.records("session-delete")).values()) == 4000
        ),
    )
    assert end["records_sent"] == end["told"] == 4000
    file.write_text(file.read_text().removesuffix(text.removeprefix(before)))
    site.gateway.ask(cmd="reload")
    assert site.gateway.show("counters")["nat_log"]["collectors"] == []
    truth = site.truth()
    assert rsyslogd.records("session-create") == truth
    assert rsyslogd.records("session-delete") == truth


def test_rfc8158_log4_over_tcp_a_broken_connection_costs_no_record(
    lab: Lab, program: Callable[[str], Path]
) -> None:
    text = rest(f'protocol: ipfix, transport: tcp, collector: "{COLLECTOR}"')
    site = Site(lab, program("dsnatd"), text, 3000)
    collector = TcpCollector(site)
    for _ in range(3):
        site.flood(1000, 2000)
        wait_until("the log to come", lambda: collector.serve() and site.log()["records_queued"] == 0)
        collector.serve()
        collector.hang_up()

    def all_told() -> bool:
        collector.serve()
        return site.log()["told"] == site.log()["records_sent"] == 6000

    wait_until("the rest", all_told)
    wait_until("the last bytes", lambda: collector.serve() and len(collector.records(5)) == 3000)
    end = site.log()
    assert end["records_lost"] == end["lost"] == 0
    truth = site.truth()
    assert collector.records(4) == truth
    assert collector.records(5) == truth
    assert collector.reader.missed == collector.reader.unreadable == 0
    assert collector.streams >= 3
    collector.hang_up()
