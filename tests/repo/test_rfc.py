"""The join between the RFC table and the tests, on tables of its own."""

from __future__ import annotations

from tests.rfc import Row, join, main, read_rows

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
