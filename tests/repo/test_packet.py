"""The builders and the reader of tests/packet.py, against packets that others made."""

from __future__ import annotations

import pytest

from tests.packet import BadPacket, icmp_error, ipv4, ping, read, tcp, udp


def test_what_is_built_reads_back() -> None:
    packet = read(tcp("100.64.0.2:40000 > 198.51.100.1:80", "SA", b"hello", mss=1460, ttl=9))
    assert (packet.source, packet.destination) == ("100.64.0.2:40000", "198.51.100.1:80")
    assert (packet.tcp_flags, packet.payload, packet.ttl) == ("SA", b"hello", 9)


def test_scapy_builds_the_same_bytes() -> None:
    from scapy.layers.inet import ICMP, IP, TCP, UDP

    ours = udp("100.64.0.2:40000 > 198.51.100.1:53", b"odd")
    assert ours == bytes(IP(src="100.64.0.2", dst="198.51.100.1", id=0) / UDP(sport=40000, dport=53) / b"odd")
    ours = tcp("100.64.0.2:40000 > 198.51.100.1:80", "S", seq=7)
    header = TCP(sport=40000, dport=80, flags="S", seq=7, window=65535)
    assert ours == bytes(IP(src="100.64.0.2", dst="198.51.100.1", id=0) / header)
    ours = ping("100.64.0.2 > 198.51.100.1", 77, 3, b"abc")
    assert ours == bytes(IP(src="100.64.0.2", dst="198.51.100.1", id=0) / ICMP(id=77, seq=3) / b"abc")


def test_a_wrong_checksum_is_noticed() -> None:
    with pytest.raises(BadPacket, match="TCP or UDP checksum"):
        read(udp("100.64.0.2:40000 > 198.51.100.1:53", corrupt=True))
    broken = bytearray(ping("100.64.0.2 > 198.51.100.1"))
    broken[8] -= 1
    with pytest.raises(BadPacket, match="IPv4 header checksum"):
        read(bytes(broken))


def test_the_packet_inside_an_error_is_read_too() -> None:
    lost = udp("203.0.113.1:5000 > 198.51.100.1:53")
    packet = read(icmp_error("198.51.100.1 > 203.0.113.1", 3, 3, lost[:28]))
    assert packet.quoted is not None
    assert packet.quoted.source == "203.0.113.1:5000"


def test_a_later_fragment_has_no_ports() -> None:
    packet = read(ipv4("100.64.0.2 > 198.51.100.1", 17, b"x" * 16, fragment_offset=1480))
    assert (packet.sport, packet.fragment_offset) == (0, 1480)
