"""What fuzzing, the oracle and the proofs have found in the core, each as the fewest packets that show it."""

from __future__ import annotations

from collections.abc import Callable

from tests.packet import UDP, icmp, ipv4, ping, tcp, udp
from tests.replay import Bench, configuration, outside


def test_an_echo_reply_of_zeros_keeps_a_checksum_that_verifies(replay: Bench) -> None:
    """RFC 1624: equation 3 gives the wrong one of the two zeros when all summed bytes are zero."""
    request = ping("100.64.0.2 > 198.51.100.1", ident=0, seq=0, payload=b"")
    asked = replay.send(request).packet
    reply = icmp(f"198.51.100.1 > {asked.source_address}", 0, 0, asked.sport << 16)
    answer = replay.send(reply, on="outside0")
    assert answer.verdict == "forward"
    assert answer.out[0].raw[20:] == bytes.fromhex("0000ffff00000000")


ENDPOINT_INDEPENDENT = """\
engine: {workers: 1, max_sessions: 1024}
interfaces:
  - {name: inside0, role: inside, path: dpdk}
  - {name: outside0, role: outside, path: dpdk}
pools:
  - name: g1
    addresses: [203.0.113.1]
    ports: 5000-PORT
    mapping: endpoint-independent
    filtering: endpoint-independent
zones:
  - {source: 100.64.0.0/16, pool: g1}
timeouts: {hold: 0s}
"""


def test_a_visitor_does_not_outlive_the_mapping_whose_port_is_another_hosts_by_then(
    bench: Callable[[str], Bench],
) -> None:
    replay = bench(ENDPOINT_INDEPENDENT.replace("PORT", "5000"))
    asked = replay.send(udp("100.64.0.2:40000 > 198.51.100.1:53"))
    replay.wait(15)
    knock = udp(f"198.51.100.2:7 > {asked.packet.source}")
    assert replay.send(knock, on="outside0").packet.destination == "100.64.0.2:40000"
    assert replay.send(udp("100.64.0.3:40000 > 198.51.100.2:7")).reason == "no_port"
    replay.wait(15)  # the query's 20 s are over
    assert replay.send(udp("100.64.0.3:40000 > 198.51.100.2:7")).verdict == "forward"
    assert replay.send(knock, on="outside0").packet.destination == "100.64.0.3:40000"


def test_fragments_of_a_hairpin_reach_the_host_also_out_of_order(bench: Callable[[str], Bench]) -> None:
    replay = bench(ENDPOINT_INDEPENDENT.replace("PORT", "5999"))
    served = replay.send(udp("100.64.0.3:80 > 198.51.100.1:99")).packet.source
    whole = udp(f"100.64.0.2:40000 > {served}", payload=bytes(range(64)))
    flow = f"100.64.0.2 > {served.partition(':')[0]}"
    first = ipv4(flow, UDP, whole[20:52], ident=7, more_fragments=True)
    last = ipv4(flow, UDP, whole[52:], ident=7, fragment_offset=32)
    assert replay.send(last).verdict == "hold"
    out = replay.send(first).out
    assert [one.interface for one in out] == ["inside0", "inside0"]
    assert [one.packet.destination_address for one in out] == ["100.64.0.3", "100.64.0.3"]
    assert b"".join(one.raw[20:] for one in out)[8:] == bytes(range(64))
    assert len({one.raw[4:6] for one in out}) == 1, "one datagram, one identification"


def test_a_host_whose_address_drained_stays_on_the_one_it_got_then(bench: Callable[[str], Bench]) -> None:
    """RFC 4787 REQ-2: a session that outlived the drain had brought the host back to the address before."""
    text = configuration("endpoint-independent", "select: paired")
    nat = bench(text)
    first = outside(nat.send(udp("100.64.0.2:4000 > 198.51.100.1:9"))).split(":")[0]
    nat.config.write_text(text.replace("ports:", f"drain: {first}, ports:"))
    assert nat.ctl(cmd="reload")["ok"]
    second = outside(nat.send(udp("100.64.0.2:4001 > 198.51.100.1:9"))).split(":")[0]
    assert second != first
    nat.config.write_text(text)
    assert nat.ctl(cmd="reload")["ok"]
    assert outside(nat.send(udp("100.64.0.2:4002 > 198.51.100.1:9"))).split(":")[0] == second


def test_a_host_whose_first_address_was_full_stays_where_its_last_session_is(
    bench: Callable[[str], Bench],
) -> None:
    """RFC 4787 REQ-2: it went back to the first address as soon as that had a port, and then had two."""
    nat = bench(configuration("endpoint-independent", "select: paired", ports="5000-5000"))
    first = outside(nat.send(tcp("100.64.0.2:4000 > 198.51.100.1:9"))).split(":")[0]
    second = outside(nat.send(tcp("100.64.0.2:4001 > 198.51.100.1:9"))).split(":")[0]
    assert second != first
    nat.wait(200)
    nat.send(tcp("100.64.0.2:4001 > 198.51.100.1:9"))
    nat.wait(100)  # the first session's 240 s are over
    assert outside(nat.send(udp("100.64.0.2:4002 > 198.51.100.1:9"))).split(":")[0] == second


def test_rfc7857_s2_a_syn_after_a_reset_waits_for_its_answer_as_a_new_one_does(replay: Bench) -> None:
    """The oracle was wrong here: it held the old connection's handshake against the new one."""
    public = outside(replay.send(tcp("100.64.0.2:4000 > 198.51.100.1:80")))
    replay.send(tcp(f"198.51.100.1:80 > {public}", "SA"), on="outside0")
    replay.send(tcp(f"198.51.100.1:80 > {public}", "R"), on="outside0")
    replay.send(tcp("100.64.0.2:4000 > 198.51.100.1:80"))
    replay.wait(235)
    assert len(replay.sessions()) == 1
    replay.wait(10)
    assert replay.sessions() == []
