"""Tables, plans and outcomes for people. For programs there is `--json`.

Plain text unless standard output is a terminal; rich, which takes longer to import than a plan to make,
only then.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TextIO

from provision.plan import Change, Plan
from provision.push import Result

MARKS = {"added": "new", "removed": "gone", "changed": "changed"}
COLOURS = {"+": "\x1b[32m", "-": "\x1b[31m", "@": "\x1b[36m"}


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], out: TextIO | None = None) -> None:
    out = out or sys.stdout
    if out.isatty() and "NO_COLOR" not in os.environ:
        from rich.console import Console
        from rich.table import Table

        fancy = Table(box=None, pad_edge=False, header_style="bold")
        for head in heads:
            fancy.add_column(head, overflow="fold")
        for row in rows:
            fancy.add_row(*row)
        Console(file=out).print(fancy)
        return
    lines = [list(heads), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    for line in lines:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip(), file=out
        )


def names(found: Sequence[str]) -> str:
    return (
        ", ".join(found)
        if len(found) <= 4
        else f"{len(found)} gateways ({found[0]}, {found[1]}, ... {found[-1]})"
    )


def plan(found: Plan, out: TextIO | None = None) -> None:
    """The risk first, the same change once."""
    out = out or sys.stdout
    for change in found.changes:
        for line in change.impact:
            print(f"! {change.gateway}: {line}", file=out)
    for group in found.groups():
        _group(group, out)
    if found.unchanged:
        print(f"unchanged: {names(found.unchanged)}", file=out)
    if found.changes:
        print(
            f"plan {found.hash}: {len(found.changes)} to change, {len(found.unchanged)} unchanged", file=out
        )
    elif found.unchanged:
        print("nothing to change", file=out)


def _group(group: Sequence[Change], out: TextIO) -> None:
    first = group[0]
    print(f"{names([c.gateway for c in group])}: {', '.join(first.actions) or 'files only'}", file=out)
    if first.drift:
        print(f"  edited on the gateway: {', '.join(first.drift)}", file=out)
    colour = out.isatty() and "NO_COLOR" not in os.environ
    for file in first.files:
        print(f"  {file.name} ({MARKS[file.kind]})", file=out)
        for line in file.diff:
            start = COLOURS.get(line[:1], "") if colour else ""
            print(f"    {start}{line}{chr(27) + '[0m' if start else ''}", file=out)


def results(found: Sequence[Result], out: TextIO | None = None) -> None:
    """What became of every gateway; the good ones in one line."""
    out = out or sys.stdout
    by: dict[str, list[Result]] = {}
    for result in found:
        by.setdefault(result.outcome, []).append(result)
    for outcome, members in sorted(by.items()):
        if members[0].good:
            print(f"{outcome}: {names([r.gateway for r in members])}", file=out)
        else:
            for result in members:
                print(f"{outcome}: {result.gateway}: {result.text}", file=out)


@contextmanager
def progress(total: int, *, quiet: bool) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal, for many gateways; elsewhere nothing, the lines say enough."""
    if quiet or total < 2 or not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda text: bar.update(task, advance=1, description=text)


def moment(seconds: object) -> str:
    if not isinstance(seconds, (int, float)):
        return "-"
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
