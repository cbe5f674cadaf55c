"""The DPDK shell with real clients and servers: net_af_packet on veths, no hugepages, twins as TAPs."""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest

from tests.gateway import INSIDE_ADDRESS, OUTSIDE_ADDRESS, Gateway, config, mac_of, new_gateway, ping
from tests.lab import Lab, Netns, wait_until
from tests.packet import ipv4, tcp, udp
from tests.traffic import CLIENT, SERVER
from tests.trunk import Trunk

pytestmark = pytest.mark.net

POOL_ROUTE = f"203.0.113.0/24 via {OUTSIDE_ADDRESS}"


@pytest.fixture
def gateway(lab: Lab, program: Callable[[str], Path]) -> Iterator[Gateway]:
    made = new_gateway(lab, program("dsnatd"), config())
    yield made
    made.close()


def test_the_gateway_itself_answers_ping_on_both_twins(gateway: Gateway) -> None:
    assert " 3 received" in ping(gateway.client, INSIDE_ADDRESS)
    assert " 3 received" in ping(gateway.server, OUTSIDE_ADDRESS)
    assert gateway.reason("local") == 6


def test_a_twin_has_the_mac_address_and_mtu_of_its_port(gateway: Gateway) -> None:
    assert mac_of(gateway.space, "inside0") == mac_of(gateway.space, "vin")
    assert mac_of(gateway.space, "outside0") == mac_of(gateway.space, "vout")
    assert "mtu 1500" in gateway.space.ip("link show inside0")


FLOW = "100.64.0.10:40000 > 100.64.0.1:"  # to the gateway itself
LINK_FRAMES = {  # destination, EtherType, what follows
    "LLDP": ("01:80:c2:00:00:0e", 0x88CC, b"\x02\x07\x04" + bytes(6) + b"\x04\x02\x07a" + bytes(40)),
    "IPv6, neighbour solicitation": (
        "33:33:ff:00:00:01",
        0x86DD,
        b"\x60\0\0\0\0\x18\x3a\xff" + bytes(32) + b"\x87" + bytes(23),
    ),
    "IPv6, to the gateway": ("", 0x86DD, b"\x60\0\0\0\0\x0c\x11\x40" + bytes(32) + bytes(12)),
    "ARP": ("ff:ff:ff:ff:ff:ff", 0x0806, b"\0\1\x08\0\6\4\0\1" + bytes(10) + bytes(10)),
    "VRRP": ("01:00:5e:00:00:12", 0x0800, ipv4("100.64.0.10 > 224.0.0.18", 112, bytes(12), ttl=255)),
    "OSPF": ("01:00:5e:00:00:05", 0x0800, ipv4("100.64.0.10 > 224.0.0.5", 89, bytes(24), ttl=1)),
    "BFD": ("", 0x0800, udp(FLOW + "3784", bytes(24), ttl=255)),
    "BGP": ("", 0x0800, tcp(FLOW + "179", "S")),
    "SSH": ("", 0x0800, tcp(FLOW + "22", "S")),
}


def test_what_is_not_nat_traffic_crosses_between_port_and_twin_unchanged_both_ways(gateway: Gateway) -> None:
    def wire(name: str) -> socket.socket:
        made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))  # all protocols
        made.bind((name, 0))
        made.settimeout(0.5)
        return made

    host, twin = gateway.client.inside(lambda: wire("eth0")), gateway.space.inside(lambda: wire("inside0"))
    wait_until("service", lambda: " 3 received" in ping(gateway.client, SERVER))
    macs = {host: mac_of(gateway.client, "eth0"), twin: mac_of(gateway.space, "inside0")}

    def arrives(frame: bytes, here: socket.socket, there: socket.socket) -> bool:
        here.send(frame)
        with suppress(TimeoutError):
            while True:
                data, source = there.recvfrom(2000)
                if source[2] != socket.PACKET_OUTGOING and data[: len(frame)] == frame:
                    return True
        return False

    with host, twin:
        for here, there in ((host, twin), (twin, host)):
            for what, (mac, kind, body) in LINK_FRAMES.items():
                frame = bytes.fromhex(f"{mac or macs[there]}{macs[here]}".replace(":", ""))
                frame += kind.to_bytes(2, "big") + body
                wait_until(what, partial(arrives, frame, here, there))


def test_a_next_hop_that_does_not_answer_arp_is_a_counted_drop_after_a_second(gateway: Gateway) -> None:
    ping(gateway.client, "198.51.100.77", "-W", "1")
    wait_until("the drops", lambda: gateway.reason("no_neighbour") == 3)
    counters = gateway.counters()
    assert counters["held"] == 0
    assert counters["forwarded"] == 0


def test_routes_are_followed_as_they_come_and_go(gateway: Gateway) -> None:
    gateway.server.ip("address add 192.0.2.9/32 dev lo")
    assert " 0 received" in ping(gateway.client, "192.0.2.9")
    assert gateway.reason("no_route") == 3
    gateway.space.ip(f"route add 192.0.2.0/24 via {SERVER}")
    assert " 3 received" in ping(gateway.client, "192.0.2.9")
    gateway.space.ip("route add prohibit 192.0.2.9/32")
    assert " 0 received" in ping(gateway.client, "192.0.2.9")
    gateway.space.ip("route delete prohibit 192.0.2.9/32")
    assert " 3 received" in ping(gateway.client, "192.0.2.9")


def test_a_twin_that_somebody_deletes_is_made_again(gateway: Gateway) -> None:
    gateway.space.ip("link delete inside0")
    wait_until("the new twin", lambda: "is made anew" in gateway.daemon.text())
    gateway.address()
    assert " 3 received" in ping(gateway.client, INSIDE_ADDRESS)
    assert " 3 received" in ping(gateway.client, SERVER)


def test_a_device_that_is_taken_away_is_one_sentence_and_its_return_a_new_start(
    lab: Lab, program: Callable[[str], Path]
) -> None:
    gateway = new_gateway(lab, program("dsnatd"), config())
    assert " 3 received" in ping(gateway.client, SERVER)
    gateway.space.ip("link delete vout")
    wait_until("the sentence", lambda: "outside0 is down: its device is gone" in gateway.daemon.text())
    wait_until("keepalived's reason to leave", lambda: "NO-CARRIER" in gateway.space.ip("link show outside0"))
    assert gateway.show("counters")["equation"]
    lab.wire(gateway.space, "vout", gateway.server, "eth0")
    gateway.server.ip(f"address add {SERVER}/24 dev eth0")
    gateway.server.ip("route add 203.0.113.0/24 via 198.51.100.1")
    assert gateway.daemon.wait(timeout_s=20) == 1, "systemd starts again what ends so"
    assert "the device of port outside0 is back" in gateway.daemon.text()
    gateway.start()
    wait_until("service", lambda: " 3 received" in ping(gateway.client, SERVER))
    gateway.close()


ON_A_STICK = """\
interfaces:
  - {name: inside0, role: inside, device: "net_af_packet0,iface=trunk", vlan: 100}
  - {name: outside0, role: outside, device: "net_af_packet0,iface=trunk", vlan: 200}
"""


def test_inside_and_outside_are_vlans_of_one_device(lab: Lab, program: Callable[[str], Path]) -> None:
    client, space, switch, server = (lab.netns(side) for side in ("client", "gateway", "switch", "server"))
    lab.wire(space, "trunk", switch, "trunk")
    switch.run("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1")
    file, control = lab.directory / "dsnatd.yaml", Path("/tmp", f"{lab.prefix}.sock")
    file.write_text(config(interfaces=ON_A_STICK))
    lab.undo.callback(control.unlink, missing_ok=True)
    gateway = Gateway(space, client, server, program("dsnatd"), file, control)
    trunk = Trunk(
        switch, "trunk", {100: client.open_tap("eth0", flags=0), 200: server.open_tap("eth0", flags=0)}
    )
    for host, address, route in (
        (client, CLIENT, f"default via {INSIDE_ADDRESS}"),
        (server, SERVER, POOL_ROUTE),
    ):
        host.ip(f"address add {address}/24 dev eth0")
        host.ip("link set eth0 up")
        host.ip(f"route add {route}")
    gateway.start()
    gateway.address()
    assert " 3 received" in ping(client, SERVER)
    assert " 3 received" in ping(client, SERVER, "-s", "1472", "-M", "do")
    assert " 3 received" in ping(client, INSIDE_ADDRESS)
    assert trunk.strays == 0, "a frame left without its tag"
    before = gateway.reason("other_host")
    untagged = bytes.fromhex(mac_of(space, "trunk").replace(":", "")) + bytes(6) + b"\x08\x00" + bytes(46)
    trunk.wire.send(untagged)
    trunk.wire.send(untagged[:12] + b"\x81\x00\x01\x2c" + untagged[12:])
    wait_until("both to be refused", lambda: gateway.reason("other_host") == before + 2)
    gateway.close()


BONDED = """\
interfaces:
  - {name: inside0, role: inside, device: "net_af_packet0,iface=vin"}
  - {name: outside0, role: outside, device: "net_bonding0,mode=1",
     members: ["net_tap0,iface=left", "net_tap1,iface=right"]}
"""

BONDED_WIRES = BONDED.replace("net_tap0", "net_af_packet1").replace("net_tap1", "net_af_packet2")


def test_two_devices_are_one_port_by_bonding(lab: Lab, program: Callable[[str], Path]) -> None:
    gateway = new_gateway(lab, program("dsnatd"), config(interfaces=BONDED), start=False)
    gateway.start()
    lab.bridge(gateway.space, "switch", "vout", "left", "right")
    gateway.address()
    for number, tap in enumerate(("left", "right")):
        # the driver has given its address to the tap; as its own, the bridge would keep the frames
        gateway.space.ip(f"link set {tap} address 02:00:00:00:00:0{number}")
    wait_until("service", lambda: " 3 received" in ping(gateway.client, SERVER))
    assert mac_of(gateway.space, "outside0") not in (mac_of(gateway.space, tap) for tap in ("left", "right"))
    lose_each_member_in_turn(gateway, gateway.space, "left", "right")


def lose_each_member_in_turn(gateway: Gateway, space: Netns, *wires: str) -> None:
    """The ends of the bond's wires that somebody may pull. Pings go on all the while, fifty a second."""
    argv = ("ping", "-n", "-i", "0.02", "-D", "-O", SERVER)
    program = gateway.client.start(*argv, log="pings.log")

    def answers_s() -> list[float]:
        return [float(at) for at in re.findall(r"^\[(\d+\.\d+)\] 64 bytes", program.text(), re.MULTILINE)]

    def longest_gap_s() -> float:
        """From some answers before now to some after."""
        count = len(answers_s())
        wait_until("answers", lambda: len(answers_s()) > count + 20)
        return max(b - a for a, b in pairwise(answers_s()[max(0, count - 20) :]))

    wait_until("the first answers", lambda: len(answers_s()) > 20)
    gaps = []

    def moves() -> int:
        return gateway.daemon.text().count(" sends by ")

    for wire in (*wires, wires[0]):
        before = moves()
        space.ip(f"link set {wire} down")
        wait_until("the word of it", partial(lambda before: moves() > before, before))
        gaps.append(longest_gap_s())
        space.ip(f"link set {wire} up")
        gaps.append(longest_gap_s())
    print("longest gaps, member lost and back in turn:", " ".join(f"{gap:.2f} s" for gap in gaps))
    assert max(gaps) < 1, gaps
    for wire in wires:
        space.ip(f"link set {wire} down")
    wait_until("the port to be down", lambda: "port outside0 is down" in gateway.daemon.text())
    wait_until("the twin to say so", lambda: "NO-CARRIER" in gateway.space.ip("link show outside0"))
    for wire in wires:
        space.ip(f"link set {wire} up")
    wait_until("service", lambda: " 3 received" in ping(gateway.client, SERVER))
    program.stop()
    gateway.close()


def test_a_bond_of_wires_goes_on_by_the_other_one_within_a_second(
    lab: Lab, program: Callable[[str], Path]
) -> None:
    gateway = new_gateway(lab, program("dsnatd"), config(interfaces=BONDED_WIRES), start=False)
    switch = lab.netns("switch")
    for end in ("left", "right"):
        lab.wire(gateway.space, end, switch, f"to{end}")
    # the server moves behind a switch that has both wires of the bond
    gateway.server.ip("link delete eth0")
    lab.wire(gateway.server, "eth0", switch, "toserver")
    lab.bridge(switch, "bridge", "toleft", "toright", "toserver")
    gateway.server.ip(f"address add {SERVER}/24 dev eth0")
    gateway.server.ip(f"route add 203.0.113.0/24 via {OUTSIDE_ADDRESS}")
    gateway.start()
    gateway.address()
    wait_until("service", lambda: " 3 received" in ping(gateway.client, SERVER))
    lose_each_member_in_turn(gateway, switch, "toleft", "toright")


def test_without_dpdk_the_same_sessions_go_on_by_the_kernels_path_where_that_is_allowed(
    lab: Lab, program: Callable[[str], Path]
) -> None:
    text = config()
    gateway = new_gateway(lab, program("dsnatd"), text, start=False)
    sessions = Path("/dev/shm", f"{lab.prefix}.sessions")
    lab.undo.callback(sessions.unlink, missing_ok=True)
    gateway.start("--sessions", str(sessions))
    gateway.address()
    assert " 3 received" in ping(gateway.client, SERVER, "-e", "4711")
    before = gateway.show("sessions")["sessions"]
    gateway.daemon.process.kill()
    gateway.daemon.wait(timeout_s=10)
    broken = text.replace("iface=vout", "iface=vout,framesz=7")  # DPDK refuses the device
    gateway.file.write_text(broken)
    refused = gateway.space.start(*gateway.argv(), "--no-huge", log="refused.log")
    assert refused.wait(timeout_s=30) == 3, refused.text()
    gateway.file.write_text(broken + "degraded: nfqueue\n")
    gateway.start("--sessions", str(sessions))
    assert "DEGRADED: going on without DPDK" in gateway.daemon.text()
    gateway.address()
    wait_until("service", lambda: " 3 received" in ping(gateway.client, SERVER, "-e", "4711"))
    assert [one["outside"] for one in gateway.show("sessions")["sessions"]] == [
        one["outside"] for one in before
    ]
    assert gateway.ask(cmd="status")["degraded"]
    gateway.ask(cmd="reload")
    gateway.close()


class Store:
    """systemd's side of sd_notify: takes messages, and keeps the descriptors that come with them."""

    def __init__(self, path: Path) -> None:
        self.path, self.messages, self.kept = path, list[str](), list[int]()
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        threading.Thread(target=self.receive, daemon=True).start()

    def receive(self) -> None:
        with suppress(OSError):
            while True:
                data, fds, _flags, _sender = socket.recv_fds(self.socket, 4096, 8)
                if not data:
                    return
                self.messages.append(data.decode())
                self.kept += fds

    def close(self) -> None:
        self.socket.close()
        self.path.unlink()
        for fd in self.kept:
            os.close(fd)


def test_a_twin_keeps_its_carrier_and_address_when_the_engine_is_killed(
    lab: Lab, program: Callable[[str], Path]
) -> None:
    gateway = new_gateway(lab, program("dsnatd"), config(), start=False)
    store = Store(Path("/tmp", f"{lab.prefix}.notify"))
    lab.undo.callback(store.close)
    gateway.start(env={"NOTIFY_SOCKET": str(store.path)})
    gateway.address()
    wait_until("a queue of each twin in the store", lambda: len(store.kept) == 2)
    assert "FDSTORE=1\nFDNAME=twin-inside0\nFDPOLL=0" in store.messages
    assert any("READY=1" in message for message in store.messages)
    assert " 3 received" in ping(gateway.client, SERVER)
    before = gateway.space.ip("address show dev outside0")
    gateway.daemon.process.kill()
    gateway.daemon.wait(timeout_s=10)
    assert "NO-CARRIER" not in before
    assert gateway.space.ip("address show dev outside0") == before
    gateway.start()
    assert " 3 received" in ping(gateway.client, SERVER)
    gateway.close()


def test_an_interface_that_is_not_there_is_one_sentence_and_status_3(
    lab: Lab, program: Callable[[str], Path]
) -> None:
    gateway = new_gateway(lab, program("dsnatd"), config().replace("iface=vin", "iface=nosuch"), start=False)
    argv = (str(gateway.program), "--config", str(gateway.file), "--socket", str(gateway.socket), "--no-huge")
    ended = gateway.space.start(*argv, log="refused.log")
    assert ended.wait(timeout_s=30) == 3
    assert "dsnatd: there is no interface nosuch; make it before dsnatd starts\n" in ended.text()
