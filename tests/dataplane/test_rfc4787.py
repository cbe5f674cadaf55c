"""RFC 4787, NAT behaviour for UDP: one test or more for each requirement, seen from outside.

    inside   100.64.0.2, 100.64.0.3 ... --- [ gateway, 203.0.113.1-203.0.113.4 ] --- 198.51.100.x, 192.0.2.x

dataplane/README.md says which are met, in which mapping mode; `make rfc` joins that list to these names.
"""

from __future__ import annotations

from collections import Counter

import pytest

from tests.packet import fragments, icmp_error, joined, ping, read, tcp, udp
from tests.replay import ED, EIM, Answer, Bench, Start, changed, configuration, outside

BOTH = pytest.mark.parametrize("mapping", [EIM, ED])
ADDRESS_DEPENDENT = "filtering: address-dependent"
PORT_DEPENDENT = "filtering: address-and-port-dependent"


def from_outside(bench: Bench, remote: str, to: str, *, after_s: float = 0) -> Answer:
    return bench.send(udp(f"{remote} > {to}"), on="outside0", after_s=after_s)


def test_rfc4787_req1_every_destination_sees_the_same_outside_address_and_port(bench: Start) -> None:
    replay = bench(configuration(EIM))
    remotes = ["198.51.100.1:53", "198.51.100.1:54", "192.0.2.9:53"]
    seen = {outside(replay.send(udp(f"100.64.0.2:40000 > {remote}"))) for remote in remotes}
    assert len(seen) == 1
    other = outside(replay.send(udp("100.64.0.2:40001 > 198.51.100.1:53")))
    assert other not in seen


@BOTH
def test_rfc4787_req2_a_paired_host_keeps_one_public_address(bench: Start, mapping: str) -> None:
    replay = bench(configuration(mapping, "select: paired", addresses="203.0.113.1-203.0.113.32"))
    flows = [f"100.64.0.2:{20000 + n} > 198.51.100.{n % 200 + 1}:80" for n in range(200)]
    sent = replay(*map(udp, flows), *map(tcp, flows), ping("100.64.0.2 > 198.51.100.1"))
    assert len({answer.packet.source_address for answer in sent}) == 1
    hosts = [
        replay.send(udp(f"100.64.1.{n} > 198.51.100.1:80".replace(" >", ":5000 >"))) for n in range(1, 33)
    ]
    assert len({answer.packet.source_address for answer in hosts}) > 8, "hosts share the pool"


@pytest.mark.parametrize("idle_s", [0, 4000])
def test_rfc4787_req2_a_pool_that_grows_does_not_move_a_host(bench: Start, idle_s: int) -> None:
    """Also one that has no session left."""
    replay = bench(configuration(EIM))
    hosts = [f"100.64.0.{n}" for n in range(1, 101)]
    before = {
        host: replay.send(udp(f"{host}:4000 > 198.51.100.1:80")).packet.source_address for host in hosts
    }
    for _ in range(2):  # the second one finds the sessions ended
        replay.wait(idle_s)
    assert len(replay.sessions()) == (0 if idle_s else len(hosts))
    replay.config.write_text(
        configuration(EIM, addresses="198.18.0.1, 203.0.113.1-203.0.113.4, 203.0.113.99")
    )
    assert replay.ctl(cmd="reload")["ok"]
    after = {host: replay.send(udp(f"{host}:4001 > 192.0.2.1:80")).packet.source_address for host in hosts}
    assert before == after


def test_rfc4787_req3_no_two_hosts_share_an_outside_port(bench: Start) -> None:
    replay = bench(configuration(EIM, addresses="203.0.113.1-203.0.113.2", ports="5000-5049"))
    answers = replay(*(udp(f"100.64.0.{n}:4000 > 198.51.{n}.1:80") for n in range(1, 101)))
    assert len({outside(answer) for answer in answers}) == 100
    refused = replay.send(udp("100.64.0.200:4000 > 192.0.2.1:80"))
    assert (refused.verdict, refused.reason) == ("drop", "no_port")


def test_rfc4787_req3a_a_port_keeps_its_class_where_the_pool_has_both(bench: Start) -> None:
    replay = bench(configuration(EIM, addresses="203.0.113.1", ports="512-2047"))
    low = replay(*(udp(f"100.64.0.{n}:500 > 198.51.100.1:80") for n in range(1, 101)))
    high = replay(*(udp(f"100.64.1.{n}:5000 > 198.51.100.1:80") for n in range(1, 101)))
    assert all(answer.packet.sport < 1024 for answer in low)
    assert all(answer.packet.sport >= 1024 for answer in high)


def test_rfc4787_req4_an_even_port_stays_even_and_an_odd_one_odd(bench: Start) -> None:
    replay = bench(configuration(EIM))
    for port in range(20000, 21000):
        assert replay.send(udp(f"100.64.0.2:{port} > 198.51.100.1:80")).packet.sport % 2 == port % 2


def test_rfc4787_req4_parity_is_kept_in_a_pool_that_is_nearly_full(bench: Start) -> None:
    replay = bench(configuration(EIM, addresses="203.0.113.1", ports="1024-2023"))
    for port in range(20000, 20960):
        assert replay.send(udp(f"100.64.0.2:{port} > 198.51.100.1:80")).packet.sport % 2 == port % 2


@BOTH
def test_rfc4787_req5_a_mapping_lives_two_minutes_at_least(bench: Start, mapping: str) -> None:
    replay = bench(configuration(mapping))
    mapped = outside(replay.send(udp("100.64.0.2:40000 > 198.51.100.1:80")))
    assert (
        from_outside(replay, "198.51.100.1:80", mapped, after_s=119.9).packet.destination
        == "100.64.0.2:40000"
    )


@BOTH
def test_rfc4787_req5a_a_shorter_timer_acts_on_dns_only_and_can_be_turned_off(
    bench: Start, mapping: str
) -> None:
    for dns, lives in (("20s", False), ("0s", True)):
        replay = bench(configuration(mapping, extra=f"timeouts: {{dns: {dns}, hold: 0s}}"))
        asked = outside(replay.send(udp("100.64.0.2:40000 > 198.51.100.1:53")))
        other = outside(replay.send(udp("100.64.0.2:40001 > 198.51.100.1:54")))
        assert (from_outside(replay, "198.51.100.1:53", asked, after_s=25).verdict == "forward") == lives
        assert from_outside(replay, "198.51.100.1:54", other).verdict == "forward"


@BOTH
def test_rfc4787_req5b_the_timer_is_a_setting(bench: Start, mapping: str) -> None:
    replay = bench(configuration(mapping, extra="timeouts: {udp: 600s, udp_one_way: 400s}"))
    mapped = outside(replay.send(udp("100.64.0.2:40000 > 198.51.100.1:80")))
    assert from_outside(replay, "198.51.100.1:80", mapped, after_s=399).verdict == "forward"
    replay.send(udp("100.64.0.2:40000 > 198.51.100.1:80"))
    assert from_outside(replay, "198.51.100.1:80", mapped, after_s=599).verdict == "forward"
    replay = bench(configuration(mapping, extra="timeouts: {udp: 130s, udp_one_way: 125s}"))
    mapped = outside(replay.send(udp("100.64.0.2:40000 > 198.51.100.1:80")))
    assert from_outside(replay, "198.51.100.1:80", mapped, after_s=130).verdict == "drop"


@BOTH
def test_rfc4787_req5c_an_answered_flow_may_be_idle_for_five_minutes(bench: Start, mapping: str) -> None:
    replay = bench(configuration(mapping))
    mapped = outside(replay.send(udp("100.64.0.2:40000 > 198.51.100.1:80")))
    from_outside(replay, "198.51.100.1:80", mapped)
    assert from_outside(replay, "198.51.100.1:80", mapped, after_s=299.9).verdict == "forward"


@BOTH
def test_rfc4787_req6_what_the_inside_sends_keeps_the_mapping(bench: Start, mapping: str) -> None:
    replay = bench(configuration(mapping))
    mapped = outside(replay.send(udp("100.64.0.2:40000 > 198.51.100.1:80")))
    for _ in range(4):
        assert outside(replay.send(udp("100.64.0.2:40000 > 198.51.100.1:80"), after_s=100)) == mapped
    assert from_outside(replay, "198.51.100.1:80", mapped, after_s=119).verdict == "forward"


def test_rfc4787_req6a_the_outside_alone_cannot_keep_an_open_mapping(bench: Start) -> None:
    """Over an endpoint-independent mapping the outside may be anybody; RFC 7857 section 7 advises against."""
    replay = bench(configuration(EIM))
    mapped = outside(replay.send(udp("100.64.0.2:40000 > 198.51.100.1:80")))
    verdicts = [from_outside(replay, "198.51.100.1:80", mapped, after_s=60).verdict for _ in range(10)]
    assert verdicts[0] == "forward"
    assert verdicts[-4:] == ["drop"] * 4


def test_rfc4787_req6a_the_one_remote_of_a_session_may_keep_it(bench: Start) -> None:
    replay = bench(configuration(ED))
    mapped = outside(replay.send(udp("100.64.0.2:40000 > 198.51.100.1:80")))
    assert all(
        from_outside(replay, "198.51.100.1:80", mapped, after_s=100).verdict == "forward" for _ in range(10)
    )


@pytest.mark.parametrize(
    ("filtering", "same_address", "other_address"),
    [("", "ok", "ok"), (ADDRESS_DEPENDENT, "ok", "filtered"), (PORT_DEPENDENT, "filtered", "filtered")],
)
def test_rfc4787_req8_a_mapping_lets_in_whom_its_filter_names(
    bench: Start, filtering: str, same_address: str, other_address: str
) -> None:
    replay = bench(configuration(EIM, filtering))
    mapped = outside(replay.send(udp("100.64.0.2:40000 > 198.51.100.1:80")))
    assert from_outside(replay, "198.51.100.1:80", mapped).reason == "ok"
    assert from_outside(replay, "198.51.100.1:81", mapped).reason == same_address
    assert from_outside(replay, "192.0.2.9:80", mapped).reason == other_address


def test_rfc4787_req8_a_filtered_remote_gets_in_once_the_host_has_written_to_it(bench: Start) -> None:
    replay = bench(configuration(EIM, ADDRESS_DEPENDENT))
    mapped = outside(replay.send(udp("100.64.0.2:40000 > 198.51.100.1:80")))
    assert from_outside(replay, "192.0.2.9:7", mapped).reason == "filtered"
    replay.send(udp("100.64.0.2:40000 > 192.0.2.9:80"))
    assert from_outside(replay, "192.0.2.9:7", mapped).packet.destination == "100.64.0.2:40000"


def test_rfc4787_req8_an_uninvited_flow_ends_with_its_mapping(bench: Start) -> None:
    """What anybody began from outside must not outlive the host's own mapping, whose port may be another's by
    then.
    """
    replay = bench(
        configuration(EIM, addresses="203.0.113.1", ports="5000-5000", extra="timeouts: {hold: 0s}")
    )
    mapped = outside(replay.send(udp("100.64.0.2:40000 > 198.51.100.1:80")))
    assert from_outside(replay, "192.0.2.9:7", mapped, after_s=100).packet.destination == "100.64.0.2:40000"
    assert from_outside(replay, "192.0.2.9:7", mapped, after_s=30).reason == "no_session"
    assert outside(replay.send(udp("100.64.0.3:40000 > 198.51.100.1:80"))) == mapped
    assert from_outside(replay, "192.0.2.9:7", mapped).packet.destination == "100.64.0.3:40000"


def test_rfc4787_req9_hosts_reach_one_another_by_their_public_addresses(bench: Start) -> None:
    replay = bench(configuration(EIM))
    mapped = outside(replay.send(udp("100.64.0.3:7000 > 198.51.100.1:80")))
    there = replay.send(udp(f"100.64.0.2:6000 > {mapped}", b"over and back", ttl=9))
    assert there.out[0].interface == "inside0"
    assert there.packet.destination == "100.64.0.3:7000"
    assert (there.packet.payload, there.packet.ttl) == (b"over and back", 8)
    back = replay.send(udp(f"100.64.0.3:7000 > {there.packet.source}"))
    assert (back.packet.source, back.packet.destination) == (mapped, "100.64.0.2:6000")


def test_rfc4787_req9_a_hairpinned_datagram_may_come_in_fragments(bench: Start) -> None:
    replay = bench(configuration(EIM))
    mapped = outside(replay.send(udp("100.64.0.3:7000 > 198.51.100.1:80")))
    datagram = udp(f"100.64.0.2:6000 > {mapped}", bytes(range(256)) * 12)
    for parts in (fragments(datagram, 800, ident=7), fragments(datagram, 800, ident=8)[::-1]):
        out = [out for answer in replay(*parts) for out in answer.out]
        assert {one.interface for one in out} == {"inside0"}
        whole = read(joined([one.raw for one in out]))
        assert whole.destination == "100.64.0.3:7000"
        assert whole.source_address.startswith("203.0.113.")
        assert whole.payload == bytes(range(256)) * 12


def test_rfc4787_req9a_a_hairpinned_packet_has_the_senders_public_source(bench: Start) -> None:
    replay = bench(configuration(EIM))
    mine = outside(replay.send(udp("100.64.0.2:6000 > 198.51.100.1:80")))
    theirs = outside(replay.send(udp("100.64.0.3:7000 > 198.51.100.1:80")))
    assert replay.send(udp(f"100.64.0.2:6000 > {theirs}")).packet.source == mine


@BOTH
def test_rfc4787_req10_the_payload_of_a_sip_message_is_left_alone(bench: Start, mapping: str) -> None:
    replay = bench(configuration(mapping))
    invite = b"INVITE sip:b@198.51.100.1 SIP/2.0\r\nVia: SIP/2.0/UDP 100.64.0.2:5060\r\n\r\n"
    message = invite + b"c=IN IP4 100.64.0.2\r\n"
    sent = udp("100.64.0.2:5060 > 198.51.100.1:5060", message, dont_fragment=True)
    answer = replay.send(sent)
    assert answer.packet.payload == message
    ttl, header_sum, source, port, udp_sum = {8}, {10, 11}, {12, 13, 14, 15}, {20, 21}, {26, 27}
    assert changed(sent, answer.out[0].raw) <= ttl | header_sum | source | port | udp_sum


def test_rfc4787_req11_a_mapping_is_the_same_kind_at_every_fill_of_the_pool(bench: Start) -> None:
    replay = bench(configuration(EIM, addresses="203.0.113.1", ports="5000-5199"))
    used = 0
    for fill in (2, 100, 198):  # of 200: 1, 50 and 99 %
        while used < fill - 1:
            replay.send(udp(f"100.64.2.{used}:4000 > 192.0.2.1:80"))
            used += 1
        host = f"100.64.3.{fill}:4000"
        seen = {
            outside(replay.send(udp(f"{host} > {remote}"))) for remote in ("198.51.100.1:1", "198.51.100.2:2")
        }
        used += 1
        assert len(seen) == 1
        stranger = from_outside(replay, "192.0.2.77:7", seen.pop())
        assert stranger.packet.destination == host


@BOTH
def test_rfc4787_req12_an_icmp_error_ends_no_mapping(bench: Start, mapping: str) -> None:
    replay = bench(configuration(mapping))
    sent = replay.send(udp("100.64.0.2:40000 > 198.51.100.1:80"))
    address = sent.packet.source_address
    for code in range(16):
        error = icmp_error(f"198.51.100.1 > {address}", 3, code, sent.out[0].raw)
        assert replay.send(error, on="outside0").packet.destination_address == "100.64.0.2"
    assert from_outside(replay, "198.51.100.1:80", outside(sent)).packet.destination == "100.64.0.2:40000"
    assert outside(replay.send(udp("100.64.0.2:40000 > 198.51.100.1:80"))) == outside(sent)


@BOTH
def test_rfc4787_req12a_an_error_may_come_from_any_router(bench: Start, mapping: str) -> None:
    replay = bench(configuration(mapping))
    sent = replay.send(udp("100.64.0.2:40000 > 198.51.100.1:80"))
    error = icmp_error(f"192.0.2.254 > {sent.packet.source_address}", 11, 0, sent.out[0].raw)
    answer = replay.send(error, on="outside0")
    assert (answer.packet.source_address, answer.packet.destination_address) == ("192.0.2.254", "100.64.0.2")


@BOTH
def test_rfc4787_req12b_a_host_hears_that_its_destination_is_unreachable(bench: Start, mapping: str) -> None:
    replay = bench(configuration(mapping))
    sent = replay.send(udp("100.64.0.2:40000 > 198.51.100.1:80"))
    error = icmp_error(f"198.51.100.1 > {sent.packet.source_address}", 3, 3, sent.out[0].raw)
    answer = replay.send(error, on="outside0")
    assert (answer.packet.icmp_type, answer.packet.icmp_code) == (3, 3)
    assert answer.packet.quoted is not None
    assert (answer.packet.quoted.source, answer.packet.quoted.destination) == (
        "100.64.0.2:40000",
        "198.51.100.1:80",
    )


@BOTH
def test_rfc4787_req13_a_packet_too_big_that_may_not_be_cut_is_answered_with_the_mtu(
    bench: Start, mapping: str
) -> None:
    replay = bench(configuration(mapping, mtu="1400"))
    big = udp("100.64.0.2:40000 > 198.51.100.1:80", b"x" * 1472, dont_fragment=True)
    answer = replay.send(big)
    assert (answer.verdict, answer.reason) == ("drop", "too_big")
    assert (answer.packet.icmp_type, answer.packet.icmp_code) == (3, 4)
    assert answer.packet.destination_address == "100.64.0.2"
    assert int.from_bytes(answer.out[0].raw[26:28]) == 1400
    assert answer.out[0].raw[28:] == big[: len(answer.out[0].raw) - 28]
    assert (
        replay.send(udp("100.64.0.2:40000 > 198.51.100.1:80", b"x" * 1372, dont_fragment=True)).verdict
        == "forward"
    )


@BOTH
def test_rfc4787_req13_a_reply_too_big_for_the_inside_is_answered_to_its_sender(
    bench: Start, mapping: str
) -> None:
    replay = bench(
        configuration(mapping).replace("role: inside, path: dpdk", "role: inside, path: dpdk, mtu: 1400")
    )
    mapped = outside(replay.send(udp("100.64.0.2:40000 > 198.51.100.1:80")))
    answer = replay.send(udp(f"198.51.100.1:80 > {mapped}", b"x" * 1472, dont_fragment=True), on="outside0")
    assert (answer.verdict, answer.reason, answer.out[0].interface) == ("drop", "too_big", "outside0")
    assert (answer.packet.icmp_type, answer.packet.icmp_code) == (3, 4)
    assert answer.packet.quoted is not None
    assert answer.packet.quoted.destination == mapped, "the inside address stays unknown"


@BOTH
def test_rfc4787_req13a_a_packet_too_big_that_may_be_cut_is_cut_in_order(bench: Start, mapping: str) -> None:
    replay = bench(configuration(mapping, mtu="1400"))
    payload = bytes(range(256)) * 20
    answer = replay.send(udp("100.64.0.2:40000 > 198.51.100.1:80", payload))
    assert answer.verdict == "forward"
    assert all(len(one.raw) <= 1400 for one in answer.out)
    offsets = [one.packet.fragment_offset for one in answer.out]
    assert len(offsets) == 4
    assert offsets == sorted(offsets)
    whole = read(joined([one.raw for one in answer.out]))
    assert (whole.payload, whole.destination, whole.ttl) == (payload, "198.51.100.1:80", 63)


@BOTH
def test_rfc4787_req13a_a_reply_too_big_for_the_inside_is_cut_too(bench: Start, mapping: str) -> None:
    replay = bench(
        configuration(mapping).replace("role: inside, path: dpdk", "role: inside, path: dpdk, mtu: 1280")
    )
    mapped = outside(replay.send(udp("100.64.0.2:40000 > 198.51.100.1:80")))
    payload = bytes(range(251)) * 10
    reply = fragments(udp(f"198.51.100.1:80 > {mapped}", payload), 1480, ident=99)
    out = [one for answer in replay(*reply, on="outside0") for one in answer.out]
    assert {one.interface for one in out} == {"inside0"}
    assert all(len(one.raw) <= 1280 for one in out)
    whole = read(joined([one.raw for one in out]))
    assert (whole.payload, whole.destination) == (payload, "100.64.0.2:40000")


@BOTH
@pytest.mark.parametrize("order", ["in order", "reversed", "last first"])
def test_rfc4787_req14_a_datagram_in_fragments_arrives_whole(bench: Start, mapping: str, order: str) -> None:
    def arranged(parts: list[bytes]) -> list[bytes]:
        if order == "reversed":
            return parts[::-1]
        return [parts[-1], *parts[:-1]] if order == "last first" else parts

    replay = bench(configuration(mapping))
    payload = bytes(n * 7 % 256 for n in range(8192))
    parts = arranged(fragments(udp("100.64.0.2:40000 > 198.51.100.1:80", payload), 1480, ident=1))
    whole = read(joined([one.raw for answer in replay(*parts) for one in answer.out]))
    assert (whole.payload, whole.destination, whole.ttl) == (payload, "198.51.100.1:80", 63)
    parts = arranged(fragments(udp(f"198.51.100.1:80 > {whole.source}", payload), 1480, ident=2))
    back = read(joined([one.raw for answer in replay(*parts, on="outside0") for one in answer.out]))
    assert (back.payload, back.destination) == (payload, "100.64.0.2:40000")


def passes_in_fragments(replay: Bench, ident: int) -> bool:
    parts = fragments(udp("100.64.0.2:40000 > 198.51.100.1:80", bytes(3000)), 1480, ident=ident)
    out = [one.raw for answer in replay(*parts[::-1]) for one in answer.out]
    return len(out) == len(parts) and read(joined(out)).payload == bytes(3000)


@BOTH
def test_rfc4787_req14a_fragments_without_a_first_one_harm_nobody_else(bench: Start, mapping: str) -> None:
    replay = bench(configuration(mapping, extra="limits: {fragments: 256}"))
    mapped = outside(replay.send(udp("100.64.0.2:40000 > 198.51.100.1:80")))
    verdicts: Counter[str] = Counter()
    for n in range(3000):
        junk = fragments(udp("192.0.2.66:1 > 203.0.113.1:2", bytes(64)), 32, ident=n)[1]
        verdicts[replay.send(junk, on="outside0").reason] += 1
        if n % 500 == 0:
            assert from_outside(replay, "198.51.100.1:80", mapped).verdict == "forward"
            assert passes_in_fragments(replay, 20000 + n)
    assert verdicts["frag_full"] > 2900
    for _ in range(60):  # a few at a time
        replay.wait(1)
    assert replay.counters()["held"] == 0


@BOTH
def test_rfc4787_req14a_first_fragments_that_nobody_asked_for_harm_nobody_else(
    bench: Start, mapping: str
) -> None:
    replay = bench(configuration(mapping, extra="limits: {fragments: 256}"))
    for n in range(3000):
        junk = fragments(udp(f"192.0.2.{n % 250 + 1}:1 > 203.0.113.1:2", bytes(64)), 32, ident=n)[0]
        assert replay.send(junk, on="outside0").reason == "no_session"
        if n % 500 == 499:
            assert passes_in_fragments(replay, 20000 + n)


@BOTH
def test_rfc4787_req14a_a_host_that_sends_only_fragments_harms_nobody_else(
    bench: Start, mapping: str
) -> None:
    replay = bench(configuration(mapping, extra="limits: {fragments: 256}"))
    for n in range(3000):
        replay.send(fragments(udp("100.64.0.66:1 > 192.0.2.1:2", bytes(64)), 32, ident=n)[0])
        if n % 500 == 499:
            assert passes_in_fragments(replay, 20000 + n)
