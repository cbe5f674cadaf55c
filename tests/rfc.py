"""`make rfc`: which requirements of the RFCs are met, in which mapping mode, and which test saw it.

The list is the table in dataplane/README.md whose rows begin with an RFC:

    | RFC 4787 REQ-1 | met | not met | endpoint-dependent gives it up: ports are per remote |
      requirement      EIM   ED        note

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


@dataclass(frozen=True)
class Row:
    requirement: str
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
        if line.startswith("| RFC ") and len(cells) == 4:
            rows.append(Row(*cells))
    return rows


def test_names(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_rfc"):
                yield node.name


def join(rows: Sequence[Row], names: Sequence[str]) -> tuple[Mapping[str, list[str]], list[str]]:
    """Tests by requirement, and what is wrong."""
    seen = {row.requirement: [name for name in names if name.startswith(row.prefix)] for row in rows}
    wrong = [f"{row.requirement}: {word!r} is not one of {', '.join(WORDS)}" for row in rows
             for word in (row.independent, row.dependent) if word not in WORDS]  # fmt: skip
    wrong += [f"{row.requirement} is met, but no test is named {row.prefix}..." for row in rows
              if "met" in (row.independent, row.dependent) and not seen[row.requirement]]  # fmt: skip
    joined = {name for group in seen.values() for name in group}
    wrong += [f"{name} belongs to no row of the table" for name in names if name not in joined]
    if not rows:
        wrong.append("dataplane/README.md has no row that begins with `| RFC`")
    return seen, wrong


def main() -> int:
    rows = read_rows((ROOT / "dataplane/README.md").read_text())
    seen, wrong = join(rows, list(test_names(ROOT / "tests")))
    print(f"{'requirement':<22}{'EIM':<9}{'ED':<9}{'tests':>5}  note")
    for row in rows:
        words = f"{row.independent:<9}{row.dependent:<9}"
        print(f"{row.requirement:<22}{words}{len(seen[row.requirement]):>5}  {row.note}")
    for mode, column in (("EIM", [row.independent for row in rows]), ("ED", [row.dependent for row in rows])):
        count = Counter(column)
        print(f"{mode}: " + ", ".join(f"{count[word]} {word}" for word in WORDS))
    for problem in wrong:
        print(f"rfc: {problem}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
