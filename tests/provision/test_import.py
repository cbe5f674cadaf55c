"""Coming from dsnat: what its files meant is what fleet.yaml says, and every lost line is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from provision.dsnat import Imported, Known, NotDsnat, import_files
from provision.load import load
from provision.render import render
from provision.validate import validate
from tests.packet import tcp
from tests.provision.conftest import KEYS
from tests.replay import Bench, outside

HERE = Path(__file__).parent / "dsnat"
EXAMPLE = (HERE / "keepalived.conf").read_text()
RC_LOCAL = (HERE / "rc.local").read_text()

KNOWN = {
    f"gw{n + 1}": Known(
        f"192.0.2.{11 + n}",
        KEYS[n],
        (("eth0", f"1.1.100.{2 + n}/16"), ("eth1", f"1.2.0.{2 + n}/16")),
        (("eth0", "0000:00:03.0"), ("eth1", "0000:00:04.0")),
    )
    for n in range(2)
}


def files(imported: Imported, tmp_path: Path, name: str = "gw1") -> dict[str, str]:
    path = tmp_path / "fleet.yaml"
    path.write_text(imported.text)
    fleet, source = load(path)
    assert [str(p) for p in validate(fleet, source) if not p.warning] == []
    return {name: file.text for name, file in render(fleet, name, secret=lambda r: "geheim").files.items()}


def test_the_documentations_example_imports_and_renders(tmp_path: Path) -> None:
    imported = import_files([("keepalived.conf", EXAMPLE)], KNOWN)
    made = files(imported, tmp_path)
    assert "profile: dsnat" in made["dsnatd.yaml"]
    assert "  - source: 1.1.0.0/16\n    pool: laddr_g1" in made["dsnatd.yaml"]
    assert "      - 1.2.100.1\n      - 1.2.100.2-1.2.100.3\n" in made["dsnatd.yaml"]
    assert "1.1.100.1/16 dev eth0" in made["keepalived.conf"]
    assert "1.2.100.1" not in made["keepalived.conf"]


def test_the_documentations_example_translates_as_it_did(
    tmp_path: Path, bench: Callable[[str], Bench]
) -> None:
    """Its client 1.1.1.1 to its server 1.2.1.4: the pool's addresses in turn, while this node is master."""
    imported = import_files([("keepalived.conf", EXAMPLE)], KNOWN)
    engine = bench(files(imported, tmp_path)["dsnatd.yaml"])
    assert engine.send(tcp("1.1.1.1:40000 > 1.2.1.4:80"), on="eth0").verdict != "forward"
    engine.ask({"addresses": {"eth0": ["1.1.0.2", "1.1.100.1"]}})
    answers = [engine.send(tcp(f"1.1.1.1:{40001 + n} > 1.2.1.4:80"), on="eth0") for n in range(6)]
    assert [outside(a).split(":")[0] for a in answers] == ["1.2.100.1", "1.2.100.2", "1.2.100.3"] * 2
    assert all(int(outside(a).split(":")[1]) >= 5000 for a in answers)
    assert engine.send(tcp("1.9.1.1:40000 > 1.2.1.4:80"), on="eth0").reason == "no_zone"


def test_everything_that_was_not_carried_over_is_named_with_its_line() -> None:
    imported = import_files([("keepalived.conf", EXAMPLE), ("rc.local", RC_LOCAL)], KNOWN)
    assert imported.remarks == (
        "keepalived.conf:29: the original ignored auth_type pass; there was no authentication, and is none",
        "keepalived.conf:40: the original ignored state master (it compares with MASTER); "
        "the priority decides",
        "keepalived.conf:45: the original ignored auth_type pass; there was no authentication, and is none",
        "keepalived.conf:60: syn_proxy had no effect on 0.0.0.0:0; left out",
        "VI_2: 1.2.100.1, 1.2.100.2 no longer float, the engine answers for a pool's "
        "addresses itself while this "
        "gateway is master",
        "VI_2 has nothing left to float and is gone; the other instances decide who is master",
        "only TCP was translated; TCP, UDP and ping are now",
        "gw1: 1.2.100.1 on eth1 belongs to a pool or to VRRP; no longer bound at boot",
        "gw1: 1.2.100.2 on eth1 belongs to a pool or to VRRP; no longer bound at boot",
    )


def test_the_files_of_both_nodes_become_a_pair(tmp_path: Path) -> None:
    backup = EXAMPLE.replace("priority 100", "priority 90")
    imported = import_files([("a", EXAMPLE), ("b", backup)], KNOWN)
    assert "unicast_peer {\n        1.1.100.2\n" in files(imported, tmp_path, "gw2")["keepalived.conf"]
    assert imported.text.count("zones:") == 1


def test_nodes_that_disagree_are_reported() -> None:
    other = EXAMPLE.replace("1.2.100.2-3", "1.2.100.9")
    imported = import_files([("a", EXAMPLE), ("b", other)], KNOWN)
    assert any("gw2: pools and zones differ" in remark for remark in imported.remarks)


def test_a_real_password_becomes_a_reference() -> None:
    imported = import_files([("k", EXAMPLE.replace("auth_type pass", "auth_type PASS"))], KNOWN)
    assert "authentication: {password: 'env:VRRP_PASSWORD'}" in imported.text
    assert "1111" not in imported.text
    assert "version: 2" in imported.text


def test_what_the_files_do_not_say_is_to_be_filled_in(tmp_path: Path) -> None:
    imported = import_files([("k", EXAMPLE)])
    assert imported.text.count("CHANGE-ME") == 4


@pytest.mark.parametrize(
    ("zone", "expected"),
    [
        ("zone 1.1.0.0 16 {", "{source: 1.1.0.0/16, pool: laddr_g1}"),
        ("zone 1.1.0.0/16 {", "{source: 1.1.0.0/16, pool: laddr_g1}"),
        ("zone 1.1.1.1 255.255.0.0 {", "{source: 1.1.0.0/16, pool: laddr_g1}"),
        ("zone 1.1.0.0 16\n{", "{source: 1.1.0.0/16, pool: laddr_g1}"),
    ],
)
def test_a_zone_in_every_spelling(zone: str, expected: str) -> None:
    text = EXAMPLE.replace("zone 1.1.0.0 255.255.0.0 {", zone)
    assert expected in import_files([("k", text)], KNOWN).text


def test_a_zone_without_addresses_stays_a_blacklist() -> None:
    text = EXAMPLE.replace("1.2.100.1\n        1.2.100.2-3\n", "", 1)
    assert "{source: 1.1.0.0/16, action: drop}" in import_files([("k", text)], KNOWN).text


def test_the_first_generations_pool_on_the_service_is_a_zone_for_everybody() -> None:
    text = EXAMPLE.replace("zone 1.1.0.0 255.255.0.0 {\n        laddr_group_name laddr_g1\n}", "")
    text = text.replace("        syn_proxy\n", "        laddr_group_name laddr_g1\n")
    assert "{source: 0.0.0.0/0, pool: laddr_g1}" in import_files([("k", text)], KNOWN).text


@pytest.mark.parametrize(
    "text",
    [
        (HERE / "ipvsadm").read_text(),
        "-A -t 0.0.0.0:0 -s rr\n-a -t 0.0.0.0:0 -r 1.0.0.1:1 (null) -w 0\n"
        "-K --zone 1.1/16\n-P --zone 1.1/16 -z 1.2.100.1\n-P --zone 1.1/16 -z 1.2.100.2\n",
    ],
)
def test_ipvsadm_lines_are_read_also_with_the_documentations_dashes(text: str) -> None:
    found = import_files([("ipvsadm", text)], KNOWN).text
    assert "{source: 1.1.0.0/16, pool: laddr_1_1_0_0_16}" in found
    assert "laddr_1_1_0_0_16: {addresses: [1.2.100.1, 1.2.100.2]}" in found


def test_a_block_that_is_never_closed_is_read_to_the_end_and_named() -> None:
    cut = EXAMPLE[: EXAMPLE.index("syn_proxy")]
    imported = import_files([("k", cut)], KNOWN)
    assert imported.text == import_files([("k", EXAMPLE)], KNOWN).text
    assert "k:55: virtual_server 0.0.0.0 0 is never closed; taken to the end of the file" in imported.remarks


@pytest.mark.parametrize(
    ("added", "remark"),
    [
        ("}\n", "k:62: a } that closes nothing"),
        ("vrrp_instance VI_3 {\n {\n x\n }\n}\n", "k:63: { of VI_3 is not carried over"),
        ("vrrp_instance VI_3 {\n priority high\n}\n", "k:63: priority of VI_3 is not carried over"),
        ("zone 1.3.0.0 16 {\n laddr_group_name nope\n}\n", "zone 1.3.0.0/16 names nope, and there is no"),
    ],
)
def test_what_keepalived_would_not_take_either_is_named(added: str, remark: str) -> None:
    found = import_files([("k", EXAMPLE + added)], KNOWN).remarks
    assert any(line.startswith(remark) for line in found), found


@pytest.mark.parametrize("text", ["", "# nothing\n", "\n\n"])
def test_files_without_anything_of_dsnat_are_refused(text: str) -> None:
    with pytest.raises(NotDsnat, match="nothing of dsnat's"):
        import_files([("k", text)], KNOWN)


def test_an_address_of_ipvsadm_that_is_none_is_left_out() -> None:
    found = import_files([("s", "-A -t 0.0.0.0:0 -s rr\n-P --zone 1.1/16 -z 1.2.100.300\n")], KNOWN)
    assert "s:2: 1.2.100.300 is not an address; left out" in found.remarks
    assert "300" not in found.text


def test_rc_local_gives_addresses_and_routes(tmp_path: Path) -> None:
    text = RC_LOCAL + "route add -net 198.51.100.0 netmask 255.255.255.0 gw 1.2.0.9\nmodprobe foo\n"
    imported = import_files([("k", EXAMPLE), ("rc.local", text)], {"gw1": Known("192.0.2.1", KEYS[0])})
    assert "eth0: {role: inside, path: nfqueue, addresses: [1.1.100.2/16]}" in imported.text
    assert "{to: 198.51.100.0/24, via: 1.2.0.9}" in imported.text
    assert "rc.local:10: modprobe foo is not carried over" in imported.remarks
