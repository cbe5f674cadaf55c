"""A switch with access ports and one trunk, as a thread: it puts 802.1Q tags on and takes them off, because
the kernel of a test machine may know no VLANs.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
from contextlib import suppress

from tests.lab import Netns

ETH_P_ALL, SOL_PACKET, PACKET_AUXDATA, PACKET_OUTGOING = 3, 263, 8, 4
TP_STATUS_VLAN_VALID = 1 << 4
AUXDATA = struct.Struct("=IIIHHHH")
MACS = 12


class Trunk:
    """Frames of the tap of VLAN v get the tag v on their way to `port`, an interface of `space`. A frame from
    there goes to the tap of its tag; one without a tap is counted in `strays`.
    """

    def __init__(self, space: Netns, port: str, taps: dict[int, int]) -> None:
        self.taps, self.strays = taps, 0

        def listen() -> socket.socket:
            wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
            wire.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
            wire.bind((port, 0))
            return wire

        self.wire = space.inside(listen)
        self.stopped, self.stop = os.pipe()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()
        space.lab.undo.callback(self.close)

    def run(self) -> None:
        vlans = {tap: vlan for vlan, tap in self.taps.items()}
        while True:
            ready, _, _ = select.select([self.wire.fileno(), self.stopped, *vlans], [], [])
            if self.stopped in ready:
                return
            with suppress(OSError):  # an interface that is down
                for one in ready:
                    if one in vlans:
                        frame = os.read(one, 65536)
                        self.wire.send(frame[:MACS] + struct.pack("!HH", 0x8100, vlans[one]) + frame[MACS:])
                    else:
                        self.from_trunk()

    def from_trunk(self) -> None:
        """The kernel takes the tag out of a frame and hands it over beside it."""
        frame, beside, _, source = self.wire.recvmsg(65536, 256)
        if source[2] == PACKET_OUTGOING:
            return
        for level, kind, data in beside:
            if level == SOL_PACKET and kind == PACKET_AUXDATA:
                status, *_, tag, _ = AUXDATA.unpack_from(data)
                if status & TP_STATUS_VLAN_VALID and tag & 0xFFF in self.taps:
                    os.write(self.taps[tag & 0xFFF], frame)
                    return
        self.strays += 1

    def close(self) -> None:
        os.close(self.stop)
        self.thread.join()
        self.wire.close()
        os.close(self.stopped)
