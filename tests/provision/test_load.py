"""The loader: what YAML hides, where errors stand, and that all of them come at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from provision.load import InvalidFleet, load
from tests.provision.conftest import LONE, Complaints, Reader, changed


def test_a_whole_fleet_is_read(read: Reader) -> None:
    fleet, source = read(LONE)
    assert str(fleet.gateways["gw1"].interfaces["inside0"].addresses[0]) == "100.64.0.2/24"
    assert source.place(("gateways", "gw1", "zones", 0, "pool")) == "fleet.yaml:16:33"


@pytest.mark.parametrize(
    ("written", "kind"),
    [
        ("52:54:00:12:34:56", "text"),
        ("1:30", "text"),
        ("no", "text"),
        ("2026-11-23", "text"),
        ("0x10", "text"),
        ("null", "nothing"),
    ],
)
def test_yaml_does_not_guess(complaints: Complaints, written: str, kind: str) -> None:
    found = complaints(
        LONE, ("management: {address: 192.0.2.11}", f"management: {{address: h, port: {written}}}")
    )
    if kind == "nothing":
        assert found == []
    else:
        assert found == [f'fleet.yaml:6:36: gateways.gw1.management.port: "{written}" is not a whole number']


def test_012_is_twelve(read: Reader) -> None:
    fleet, _ = read(changed(LONE, ("id: 10", "id: 012")))
    assert fleet.gateways["gw1"].vrrp is not None
    assert fleet.gateways["gw1"].vrrp.instances["inside0"].id == 12


def test_no_is_not_false(complaints: Complaints) -> None:
    found = complaints(LONE, ("    vrrp:\n", "    vrrp:\n      preempt: no\n"))
    assert found == ['fleet.yaml:12:16: gateways.gw1.vrrp.preempt: "no" is neither true nor false']


def test_the_same_key_twice_names_both_lines(complaints: Complaints) -> None:
    found = complaints(LONE, ("  home: {", "  home: {addresses: [203.0.113.9]}\n  home: {"))
    assert found == [
        'fleet.yaml:4:3: pools.home: "home" is given twice; remove or rename one '
        "(the other is at fleet.yaml:3:3)"
    ]


def test_an_unknown_key_comes_with_a_guess(complaints: Complaints) -> None:
    found = complaints(LONE, ("addresses: [203", "adresses: [203"))
    assert found == [
        'fleet.yaml:3:3: pools.home: "addresses" is missing; add it',
        'fleet.yaml:3:10: pools.home.adresses: unknown key "adresses"; did you mean "addresses"?',
    ]


def test_a_wrong_word_comes_with_a_guess(complaints: Complaints) -> None:
    found = complaints(LONE, ("role: inside,", "role: insde,"))
    assert found == [
        'fleet.yaml:9:23: gateways.gw1.interfaces.inside0.role: "insde" is not one of: inside, outside; '
        "did you mean inside?"
    ]


def test_every_error_comes_at_once_with_its_line_and_a_caret(read: Reader) -> None:
    text = changed(
        LONE,
        ("203.0.113.1-203.0.113.4", "203.0.113.4-203.0.113.1"),
        ('device: "0000:00:03.0"', "device: eth3"),
        ("id: 20", "id: 2000"),
        ("via: 198.51.100.254", "via: nowhere"),
        ("pool: home", "pool: hone"),
    )
    with pytest.raises(InvalidFleet) as invalid:
        read(text)
    shown = str(invalid.value)
    assert [p.line for p in invalid.value.problems] == [3, 9, 14, 16, 18]
    assert 'there is no pool "hone"; did you mean "home"?' in shown
    assert "    home: {addresses: [203.0.113.4-203.0.113.1]}\n" + " " * 25 + "^" in shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "fleet.yaml: is empty; it starts with schema: 1, README.md shows the rest"),
        ("- a\n", "fleet.yaml:1:1: must be a map of keys such as schema:, pools: and gateways:"),
        ("a: [1\n", "fleet.yaml:2:1: not valid YAML"),
        ("a: &x [*x]\nschema: 1\n", "fleet.yaml:1:4: a.0: an alias leads back to itself"),
        ("schema: !!python/name:os.system x\n", "fleet.yaml:1:9: schema:"),
        ("schema: 2\n", 'fleet.yaml:1:9: schema: "2" is not one of: 1'),
    ],
)
def test_what_is_no_fleet_at_all_is_said_in_one_sentence(
    complaints: Complaints, text: str, expected: str
) -> None:
    assert any(line.startswith(expected) for line in complaints(text)), complaints(text)


def test_a_file_that_is_not_text_is_said_so(tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_bytes(b"schema: 1\n# \xff\n")
    with pytest.raises(InvalidFleet, match=r"fleet\.yaml:2:1: is not UTF-8"):
        load(path)


def test_included_files_add_to_the_maps_and_keep_their_own_lines(read: Reader, tmp_path: Path) -> None:
    (tmp_path / "pools").mkdir()
    (tmp_path / "pools/a.yaml").write_text("pools:\n  office: {addresses: [203.0.113.9]}\n")
    fleet, source = read("include: [pools/*.yaml]\n" + LONE)
    assert set(fleet.pools) == {"home", "office"}
    assert source.place(("pools", "office")) == "pools/a.yaml:2:3"


def test_a_name_in_two_files_names_both(read: Reader, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("pools:\n  home: {addresses: [203.0.113.9]}\n")
    with pytest.raises(InvalidFleet, match=r"a\.yaml:2:3: .*given twice.*fleet\.yaml:4:3"):
        read("include: [a.yaml]\n" + LONE)


@pytest.mark.parametrize("pattern", ["''", ".", "a**b"])
def test_an_include_that_is_no_pattern_is_an_error_and_no_traceback(
    complaints: Complaints, pattern: str
) -> None:
    (found,) = complaints(f"include: [{pattern}]\n" + LONE)
    assert found.startswith("fleet.yaml:1:11: include: ")


def test_an_include_of_nothing_is_an_error(complaints: Complaints) -> None:
    assert complaints("include: [none/*.yaml]\n" + LONE) == [
        "fleet.yaml:1:11: include: no file matches none/*.yaml; the name is relative to fleet.yaml"
    ]


def test_a_secret_in_the_file_is_refused(complaints: Complaints) -> None:
    found = complaints(
        LONE, ("    vrrp:\n", "    vrrp:\n      version: 2\n      authentication: {password: geheim}\n")
    )
    assert len(found) == 1
    assert "is not a reference to a secret" in found[0]
