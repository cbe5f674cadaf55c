"""`make rfc`: which requirements of the RFCs are met, in which mapping mode, and which test saw it.

The list is the table in dataplane/README.md whose rows begin with an RFC:

    | RFC 4787 REQ-1 | MUST | met | not met | one outside port for one inside port, whatever the destination |
      requirement      level  EIM   ED        note

The tests are joined by name: RFC 4787 REQ-14a is seen by every test whose name begins with
test_rfc4787_req14a_. A "met" without a test, a test without a row, and a word that is not one of met, not met
and n/a are errors.

Exit status: 0 the table holds; 1 it does not, and why.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORDS = ("met", "not met", "n/a")
LEVELS = ("MUST", "SHOULD", "RECOMMENDED", "MAY", "info")  # RFC 2119; info: the RFC asks for nothing


@dataclass(frozen=True)
class Row:
    requirement: str
    level: str
    independent: str
    dependent: str
    note: str

    @property
    def prefix(self) -> str:
        """`RFC 7857 §2.1` -> `test_rfc7857_s2_1_`."""
        text = self.requirement.lower().replace("rfc ", "rfc").replace("§", "s").replace("req-", "req")
        return "test_" + re.sub(r"[^a-z0-9]+", "_", text.replace("-", "")) + "_"


def read_rows(page: str) -> list[Row]:
    rows = []
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("| RFC ") and len(cells) == 5:
            rows.append(Row(*cells))
    return rows


def test_names(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and re.match(r"test_rfc\d", node.name):
                yield node.name


def join(rows: Sequence[Row], names: Sequence[str]) -> tuple[Mapping[str, list[str]], list[str]]:
    """Tests by requirement, and what is wrong."""
    seen: dict[str, list[str]] = {row.requirement: [] for row in rows}
    wrong = [
        f"{requirement} has two rows"
        for requirement, n in Counter(row.requirement for row in rows).items()
        if n > 1
    ]
    for name in names:
        # test_rfc7857_s2_1_ is of section 2.1, though it begins as section 2 does
        owner = max(
            (row for row in rows if name.startswith(row.prefix)),
            key=lambda row: len(row.prefix),
            default=None,
        )
        if owner:
            seen[owner.requirement].append(name)
        else:
            wrong.append(f"{name} belongs to no row of the table")
    for row in rows:
        for word, known in ((row.independent, WORDS), (row.dependent, WORDS), (row.level, LEVELS)):
            if word not in known:
                wrong.append(f"{row.requirement}: {word!r} is not one of {', '.join(known)}")
        if "met" in (row.independent, row.dependent) and not seen[row.requirement]:
            wrong.append(f"{row.requirement} is met, but no test is named {row.prefix}...")
        if not row.note:
            wrong.append(f"{row.requirement} does not say what or why")
    if not rows:
        wrong.append("dataplane/README.md has no row that begins with `| RFC`")
    return seen, wrong


def counts(words: Sequence[str]) -> str:
    count = Counter(words)
    return ", ".join(f"{count[word]} {word}" for word in WORDS)


def main() -> int:
    rows = read_rows((ROOT / "dataplane/README.md").read_text())
    seen, wrong = join(rows, list(test_names(ROOT / "tests")))
    print(f"{'requirement':<17}{'level':<12}{'EIM':<9}{'ED':<9}{'tests':>5}  what, or why not")
    for row in rows:
        print(
            f"{row.requirement:<17}{row.level:<12}{row.independent:<9}{row.dependent:<9}"
            f"{len(seen[row.requirement]):>5}  {row.note}"
        )
    print()
    for mode, words in (
        ("EIM", [(row.level, row.independent) for row in rows]),
        ("ED", [(row.level, row.dependent) for row in rows]),
    ):
        print(f"{mode + ':':<5}{counts([word for _, word in words])}")
        print(f"{'':<5}of these MUST: {counts([word for level, word in words if level == 'MUST'])}")
    print(f"{sum(map(len, seen.values()))} tests")
    for problem in wrong:
        print(f"rfc: {problem}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
