"""Files from a fleet: golden, the same every time, and never broken by a value."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from provision.render import Rendered, RenderError, _fill, render
from provision.secret import SecretError, vrrp_password
from tests.provision.conftest import CLUSTER, KEYS, LONE, PAIR, Reader, changed

GOLDEN = Path(__file__).resolve().parents[1] / "golden/provision"


def files_of(read: Reader, text: str, name: str = "gw1") -> Rendered:
    fleet, _ = read(text)
    return render(fleet, name, secret=lambda reference: "geheim12")


RICH = changed(
    PAIR,
    (
        "113.4]}",
        "113.3, {range: 203.0.113.4, weight: 3}], drain: [203.0.113.4], block_ports: 64, "
        "ports: 2048-65535, mapping: endpoint-independent, "
        "filtering: address-dependent, select: paired, announce: arp}",
    ),
    (
        "pairs:\n  edge:\n",
        f"""\
users:
  alice: {{keys: ["{KEYS[1]} alice@desk"]}}
  bob: {{keys: ["{KEYS[0]}"], access: shell}}
sites:
  lab: {{ntp: [192.0.2.123]}}
pairs:
  edge:
    site: lab
    limits: {{sessions_per_host: 500}}
    timeouts: {{udp: 30s, dns: 10s}}
    tcp_midflow: reset
    refusal: icmp-admin
    other_protocols: pass
    logging:
      - {{protocol: ipfix, transport: tcp, collector: "192.0.2.50:4739", pools: [home]}}
      - {{protocol: syslog, collector: 192.0.2.51, destinations: "on"}}
    bgp: {{as: 65001, neighbors: [{{address: 198.51.100.254, as: 65000}}]}}
    static:
      - {{inside: 100.64.0.8, outside: 203.0.113.2}}
      - {{inside: 100.64.0.9, outside: 203.0.113.1, protocol: tcp, port: 80, inside_port: 8080}}
    routes: [{{to: default, via: 198.51.100.254}}, {{to: 100.64.8.0/22, via: 100.64.0.9}}]
""",
    ),
    ("      - {source", "      - {source: 100.64.0.7/32, action: drop}\n      - {mss_clamp: 1400, source"),
    (
        "instances:\n",
        "version: 2\n      authentication: {password: 'env:P'}\n      preempt: true\n      "
        "preempt_delay: 30s\n"
        "      instances:\n",
    ),
    ("priority: 100", "priority: 90"),
    (
        "{address: 192.0.2.12}",
        "{address: 192.0.2.12, interface: mgmt0, routes: [{to: default, via: 192.0.2.1}]}",
    ),
)


@pytest.mark.parametrize(
    ("case", "name"), [("lone", "gw1"), ("pair", "gw2"), ("rich", "gw2"), ("cluster", "gw2")]
)
def test_files_are_as_agreed(read: Reader, request: pytest.FixtureRequest, case: str, name: str) -> None:
    rendered = files_of(read, {"lone": LONE, "pair": PAIR, "rich": RICH, "cluster": CLUSTER}[case], name)
    found = "".join(
        f"==> {file} {value.mode:o}\n{value.text}" for file, value in sorted(rendered.files.items())
    )
    path = GOLDEN / f"{case}-{name}.txt"
    if request.config.getoption("--update-golden"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(found)
    assert found == path.read_text()


def test_the_same_fleet_gives_the_same_bytes(read: Reader) -> None:
    assert files_of(read, RICH).files == files_of(read, RICH).files


def test_the_engines_file_is_yaml_that_says_what_was_meant(read: Reader) -> None:
    data = YAML(typ="safe", pure=True).load(files_of(read, RICH).files["dsnatd.yaml"].text)
    assert data["interfaces"][0] == {
        "name": "inside0",
        "role": "inside",
        "path": "dpdk",
        "device": "0000:00:03.0",
    }
    assert data["pools"][0]["active_while"] == "198.51.100.1"
    assert data["zones"][0] == {"source": "100.64.0.7/32", "action": "drop"}
    assert data["limits"] == {"sessions_per_host": 500}


def test_a_password_makes_the_file_private(read: Reader) -> None:
    file = files_of(read, RICH).files["keepalived.conf"]
    assert file.mode == 0o600
    assert "auth_pass geheim12\n" in file.text


KEY = "5e" * 32


def test_both_of_a_pair_tell_each_other_their_sessions(read: Reader) -> None:
    fleet, _ = read(
        changed(PAIR, ("pairs:\n  edge:\n", "pairs:\n  edge:\n    sync: {key: 'file:k', hold_back: 1s}\n"))
    )
    for name, own, peer in (("gw1", "192.0.2.11", "192.0.2.12"), ("gw2", "192.0.2.12", "192.0.2.11")):
        rendered = render(fleet, name, secret=lambda reference: KEY)
        key = rendered.files["sync.key"]
        assert (key.mode, key.text) == (0o600, f"{KEY}\n")
        assert KEY in rendered.secrets
        assert KEY not in rendered.files["dsnatd.yaml"].text
        assert (
            rendered.files["dsnatd.yaml"].text.count(f"""\
sync:
  peer: "{peer}:3781"
  listen: "{own}:3781"
  key: file:/etc/dsnat/sync.key
  hold_back: 1s
""")
            == 1
        )


def test_what_is_no_key_is_refused_without_being_shown(read: Reader) -> None:
    fleet, _ = read(changed(PAIR, ("pairs:\n  edge:\n", "pairs:\n  edge:\n    sync: {key: 'file:k'}\n")))
    with pytest.raises(RenderError, match="file:k is not the key of a pair") as refused:
        render(fleet, "gw1", secret=lambda reference: "geheim12")
    assert "geheim" not in str(refused.value)


def test_the_engine_has_a_say_in_the_priority(read: Reader) -> None:
    text = files_of(read, PAIR, "gw1").files["keepalived.conf"].text
    assert "file /run/dsnatd/vrrp\n    weight 1\n" in text
    assert "sync_group_tracking_weight" in text
    assert text.count("        dsnat_engine\n") == 2


def test_the_peers_speak_unicast_to_each_other(read: Reader) -> None:
    one = files_of(read, PAIR, "gw1").files["keepalived.conf"].text
    two = files_of(read, PAIR, "gw2").files["keepalived.conf"].text
    assert "unicast_src_ip 100.64.0.2\n    unicast_peer {\n        100.64.0.3\n" in one
    assert "unicast_src_ip 100.64.0.3\n    unicast_peer {\n        100.64.0.2\n" in two
    assert "state BACKUP" in one
    assert "state MASTER" not in one + two


def test_more_than_twenty_addresses_float(read: Reader) -> None:
    many = ", ".join(f"100.64.0.{n}/24" for n in range(10, 35))
    text = files_of(read, changed(LONE, ("addresses: [100.64.0.1/24]", f"addresses: [{many}]"))).files
    listed, _, excluded = text["keepalived.conf"].text.partition("virtual_ipaddress_excluded")
    assert listed.count("dev inside0") == 20
    assert excluded.count("dev inside0") == 5


@pytest.mark.parametrize(
    ("replace", "restart"),
    [
        (("203.0.113.4", "203.0.113.5"), False),
        (("0000:00:04.0", "0000:00:05.0"), True),
        (("schema: 1\n", "schema: 1\ndefaults: {engine: {workers: 2}}\n"), True),
        (("schema: 1\n", "schema: 1\ndefaults: {timeouts: {udp: 30s}}\n"), False),
    ],
)
def test_the_digest_of_hardware_changes_with_what_needs_a_restart(
    read: Reader, replace: tuple[str, str], restart: bool
) -> None:
    before, after = files_of(read, LONE), files_of(read, changed(LONE, replace))
    assert (before.hardware != after.hardware) is restart


@given(st.text(min_size=1))
def test_no_value_can_leave_its_place_in_a_file(value: str) -> None:
    try:
        text = _fill("fleet.sources.j2", gateway="gw1", servers=[value])
    except RenderError:
        return
    assert text == f"# Made by dsnat-fleet.\nserver {value} iburst\n"
    assert not set(value) & set("\n\r{}\"'#!\\$`")


@pytest.mark.parametrize("value", ["a\n}", "a {", 'a"', "a\r", "a#b", "a\x00", "é"])
def test_a_value_with_a_dangerous_character_is_an_error(value: str) -> None:
    with pytest.raises(RenderError, match="is not allowed"):
        _fill("fleet.sources.j2", gateway="gw1", servers=[value])


def test_a_template_that_lacks_a_value_is_an_error() -> None:
    with pytest.raises(RenderError, match=r"fleet\.sources\.j2 uses a value"):
        _fill("fleet.sources.j2", gateway="gw1")


def test_secrets_come_from_where_they_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("P", "geheim12")
    (tmp_path / "p").write_text("geheim34\nrest\n")
    assert vrrp_password("env:P", tmp_path) == "geheim12"
    assert vrrp_password("file:p", tmp_path) == "geheim34"


@pytest.mark.parametrize("reference", ["env:NOT_SET_AT_ALL", "file:none", "env:LONG", "env:ODD"])
def test_a_secret_that_cannot_be_used_is_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str
) -> None:
    monkeypatch.setenv("LONG", "geheim123")
    monkeypatch.setenv("ODD", "geh\teim")
    with pytest.raises(SecretError) as error:
        vrrp_password(reference, tmp_path)
    assert "geh" not in str(error.value)
