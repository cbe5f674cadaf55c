"""A real client asks for a mapping, and a real connection comes in over it."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.gateway import INSIDE_ADDRESS, POOLS_AND_ZONES, config, new_gateway
from tests.lab import Lab
from tests.traffic import CLIENT, POOL

pytestmark = pytest.mark.net


def test_rfc6888_req9_natpmpc_opens_a_port_that_the_outside_reaches(
    lab: Lab, program: Callable[[str], Path]
) -> None:
    rest = POOLS_AND_ZONES.replace("addresses:", "mapping: endpoint-independent, addresses:")
    rest += "port_control: on\n"
    gateway = new_gateway(lab, program("dsnatd"), config(rest=rest))
    text = gateway.client.run("natpmpc", "-g", INSIDE_ADDRESS, "-a", "8080", "8080", "tcp", "600")
    mapped = re.search(r"Mapped public port (\d+) protocol TCP to local port 8080 life?time 600", text)
    assert mapped, text
    address = re.search(r"Public IP address : (\S+)", text)
    assert address
    assert address[1] in POOL
    listener = gateway.client.inside(lambda: socket.create_server((CLIENT, 8080)))
    listener.settimeout(10)
    knock = gateway.server.start("curl", "-s", "-m", "5", f"http://{address[1]}:{mapped[1]}", log="knock.log")
    with listener:
        connection, remote = listener.accept()
    connection.close()
    assert remote[0].startswith("198.51.100.")
    knock.wait(timeout_s=10)
    gateway.close()
