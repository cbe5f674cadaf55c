"""The join between the RFC table and the tests, on tables of its own."""

from __future__ import annotations

from tests.rfc import Row, join, read_rows

PAGE = """
| requirement | EIM | ED | note |
|---|---|---|---|
| RFC 4787 REQ-14a | met | met | bounded memory |
| RFC 7857 §2.1 | met | n/a | |
"""


def test_a_requirement_finds_its_tests_by_name() -> None:
    rows = read_rows(PAGE)
    assert [row.prefix for row in rows] == ["test_rfc4787_req14a_", "test_rfc7857_s2_1_"]
    names = ["test_rfc4787_req14a_a_flood", "test_rfc7857_s2_1_a_rst"]
    seen, wrong = join(rows, names)
    assert wrong == []
    assert seen["RFC 7857 §2.1"] == ["test_rfc7857_s2_1_a_rst"]


def test_a_met_without_a_test_is_an_error() -> None:
    _, wrong = join(read_rows(PAGE), ["test_rfc4787_req14a_a_flood"])
    assert wrong == ["RFC 7857 §2.1 is met, but no test is named test_rfc7857_s2_1_..."]


def test_a_test_without_a_row_is_an_error() -> None:
    _, wrong = join([Row("RFC 4787 REQ-1", "not met", "n/a", "")], ["test_rfc4787_req14_x"])
    assert wrong == ["test_rfc4787_req14_x belongs to no row of the table"]
