"""What fuzzing, the oracle and the proofs have found in the core, each as the fewest packets that show it."""

from __future__ import annotations

from collections.abc import Callable

from tests.packet import icmp, ping
from tests.replay import Bench


def test_an_echo_reply_of_zeros_keeps_a_checksum_that_verifies(replay: Bench) -> None:
    """RFC 1624: equation 3 gives the wrong one of the two zeros when all the bytes that are summed are zero."""
    request = ping("100.64.0.2 > 198.51.100.1", ident=0, seq=0, payload=b"")
    asked = replay.send(request).packet
    reply = icmp(f"198.51.100.1 > {asked.source_address}", 0, 0, asked.sport << 16)
    answer = replay.send(reply, on="outside0")
    assert answer.verdict == "forward"
    assert answer.out[0].raw[20:] == bytes.fromhex("0000ffff00000000")
