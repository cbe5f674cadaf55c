"""The RFC table: its join with the tests, and with what `dsnatctl rfc` says of the settings."""

from __future__ import annotations

from dsnatctl import rfc
from tests.rfc import ROOT, Row, join, main, read_rows

PAGE = """
| requirement | level | EIM | ED | note |
|---|---|---|---|---|
| RFC 4787 REQ-14a | MUST | met | met | bounded memory |
| RFC 7857 §2 | SHOULD | met | met | states |
| RFC 7857 §2.1 | SHOULD | met | n/a | timers |
"""


TESTS = ["test_rfc4787_req14a_a_flood", "test_rfc7857_s2_states", "test_rfc7857_s2_1_a_timer"]


def test_a_requirement_finds_its_tests_by_name() -> None:
    seen, wrong = join(read_rows(PAGE), TESTS)
    assert wrong == []
    assert seen == {
        "RFC 4787 REQ-14a": [TESTS[0]],
        "RFC 7857 §2": [TESTS[1]],
        "RFC 7857 §2.1": [TESTS[2]],
    }


def test_a_met_without_a_test_is_an_error() -> None:
    _, wrong = join(read_rows(PAGE), TESTS[:2])
    assert wrong == ["RFC 7857 §2.1 is met, but no test is named test_rfc7857_s2_1_..."]


def test_a_test_without_a_row_is_an_error() -> None:
    _, wrong = join([Row("RFC 4787 REQ-1", "MUST", "not met", "n/a", "why")], ["test_rfc4787_req14_x"])
    assert wrong == ["test_rfc4787_req14_x belongs to no row of the table"]


def test_a_word_that_is_not_a_status_is_an_error() -> None:
    _, wrong = join([Row("RFC 4787 REQ-1", "MUST", "not met", "mostly", "why")], [])
    assert wrong == ["RFC 4787 REQ-1: 'mostly' is not one of met, not met, n/a"]


def test_the_table_of_the_readme_holds() -> None:
    assert main() == 0


def clauses(text: str) -> set[str]:
    """`RFC 4787 REQ-1, REQ-3; RFC 7857 §4` -> {"RFC 4787 REQ-1", "RFC 4787 REQ-3", "RFC 7857 §4"}."""
    found = set()
    for group in text.split("; "):
        _, number, rest = group.split(" ", 2)
        found |= {f"RFC {number} {clause}" for clause in rest.split(", ")}
    return found


def test_dsnatctl_says_of_endpoint_dependent_mapping_what_the_table_says() -> None:
    rows = read_rows((ROOT / "dataplane/README.md").read_text())
    lost = {row.requirement for row in rows if row.independent == "met" and row.dependent == "not met"}
    assert clauses(rfc.DEPENDENT) | clauses(rfc.ROUND_ROBIN) == lost | {"RFC 6888 REQ-9"}
