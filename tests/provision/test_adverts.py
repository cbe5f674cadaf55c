"""What the agent hears of VRRP, from a real keepalived: the evidence that a backup has a master."""

from __future__ import annotations

from pathlib import Path

import pytest

from provision.agent.machine import Machine
from tests.lab import Lab, Netns

CONF = """\
global_defs {{
    vrrp_version {version}
}}
vrrp_instance inside {{
    state BACKUP
    interface eth0
    virtual_router_id 10
    priority {priority}
    advert_int 1
    {peer}
    virtual_ipaddress {{
        192.0.2.10/24 dev eth0
    }}
}}
"""


def start_keepalived(space: Netns, folder: Path, *, own: str, peer: str, version: int, unicast: bool) -> None:
    folder.mkdir()
    unicast_peer = f"unicast_src_ip {own}\n    unicast_peer {{\n        {peer}\n    }}" if unicast else ""
    priority = 150 if own.endswith(".1") else 100
    (folder / "keepalived.conf").write_text(
        CONF.format(version=version, priority=priority, peer=unicast_peer)
    )
    files = ("-f", folder / "keepalived.conf", "-p", folder / "pid", "-r", folder / "vrrp.pid")
    space.start("keepalived", "-n", "-l", "-P", *map(str, files), log=f"{folder.name}.log")


@pytest.mark.net
@pytest.mark.parametrize(("version", "unicast"), [(3, True), (2, False)])
def test_a_backup_hears_its_master_and_the_master_nobody(
    lab: Lab, tmp_path: Path, version: int, unicast: bool
) -> None:
    left, right = lab.netns("left"), lab.netns("right")
    lab.wire(left, "eth0", right, "eth0")
    for space, own, peer in ((left, "192.0.2.1", "192.0.2.2"), (right, "192.0.2.2", "192.0.2.1")):
        space.ip(f"address add {own}/24 dev eth0")
        start_keepalived(space, tmp_path / space.name, own=own, peer=peer, version=version, unicast=unicast)
    machine = Machine(tmp_path)
    assert right.inside(lambda: machine.adverts({10}, 30.0)) == {10: "192.0.2.1"}
    assert left.inside(lambda: machine.adverts({10}, 2.0)) == {}
    assert right.inside(lambda: machine.adverts({11}, 2.0)) == {}  # another group's id
