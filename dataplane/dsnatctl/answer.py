"""What all verbs share: how an answer is told, and how a verb ends that cannot be carried out.

A verb takes the parsed arguments and gives an exit status. It raises `UsageError` for words that do not go
together, lets `Unreachable` and `Refused` of client.py pass, and __main__.py makes one sentence of each. With
`--json` whatever the engine says goes out as it came, refusals included.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator

from dsnatctl import show
from dsnatctl.client import Json, Refused

FAILED, USAGE, UNREACHABLE, INTERRUPTED = 1, 2, 3, 130
FILTERS = ("host", "remote", "outside", "protocol", "state", "pool", "older_s", "younger_s")


class UsageError(Exception):
    """Right words, wrong combination."""


def tell(answer: Json, view: Callable[[Json], Iterator[str]], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(answer))
    else:
        sys.stdout.writelines(f"{line}\n" for line in view(answer))


def wrong_file(refused: Refused, *, as_json: bool) -> int:
    """The candidate file has errors: all of them."""
    if "problems" not in refused.answer:
        raise refused
    if as_json:
        print(json.dumps(refused.answer))
    sys.stderr.writelines(f"{line}\n" for line in show.problems(refused.answer))
    return USAGE


def filters(arguments: argparse.Namespace) -> Json:
    """What was given. An empty one is a mistake: `clear --host "$UNSET" --pool a` would end all of them."""
    given = {name: value for name in FILTERS if (value := getattr(arguments, name, None)) is not None}
    for name, value in given.items():
        if value == "":
            raise UsageError(f"--{name.replace('_', '-')} is empty; give it a value, or leave it out")
    return given


def text_of(file: str) -> str:
    from pathlib import Path

    try:
        return Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{file} cannot be read ({error.strerror}); give a configuration file") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not UTF-8 text; give a configuration file") from error


def hush() -> None:
    """Nobody reads on: nothing may be written at exit either."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
