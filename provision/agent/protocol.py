"""What is said between `dsnat-fleet` and a gateway: requests as values, and how one is refused."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

PROTOCOL = 1
VERSION = "0.1.0"
REQUEST_MAX = 16 << 20
FILE_NAMES = re.compile(
    r"dsnatd\.yaml|keepalived\.conf|bird\.conf|sync\.key|network/[A-Za-z0-9_.-]{1,64}\.network"
    r"|chrony/[a-z-]{1,32}\.sources|authorized_keys/[a-z][a-z0-9-]{0,30}"
)

Json = dict[str, Any]


class Refused(Exception):
    """A request that is answered with an error. `kind` is for programs, the sentence for people."""

    def __init__(self, kind: str, text: str, **more: Any) -> None:
        super().__init__(text)
        self.kind, self.more = kind, more


def number_in(request: Json, key: str, default: int, low: int, high: int) -> int:
    value = request.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise Refused("usage", f'"{key}" must be a whole number from {low} to {high}')
    return value


def line_in(request: Json, key: str) -> str:
    """One printable line: it goes into the journal."""
    value = request.get(key, "")
    if not isinstance(value, str) or len(value) > 200 or not value.isprintable():
        raise Refused("usage", f'"{key}" must be a line of text')
    return value


def files_in(request: Json) -> dict[str, tuple[bytes, int]]:
    given = request.get("files")
    if not isinstance(given, dict) or not given:
        raise Refused("usage", "the request holds no files")
    files: dict[str, tuple[bytes, int]] = {}
    for name, file in given.items():
        if not FILE_NAMES.fullmatch(name) or not isinstance(file, dict):
            raise Refused("usage", f"{name!r} is not a file of a generation")
        text, mode = file.get("text"), file.get("mode", 0o644)
        if not isinstance(text, str) or mode not in (0o600, 0o640, 0o644):
            raise Refused("usage", f"{name}: the text or the mode is missing or wrong")
        files[name] = (text.encode(), mode)
    return files


def files_below(directory: Path) -> set[str]:
    names = {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}
    return {name for name in names if FILE_NAMES.fullmatch(name)}


def without_secrets(text: str) -> str:
    text = re.sub(r"(?m)^(\s*auth_pass\s+)\S.*$", r"\1(secret)", text)
    return re.sub(r"(?m)^[0-9a-fA-F]{64}$", "(secret)", text)  # the key of a pair


def read_request() -> Json:
    """One line; what follows it, if anything, is the request's payload."""
    raw = sys.stdin.buffer.readline(REQUEST_MAX + 1)
    try:
        request = json.loads(raw) if len(raw) <= REQUEST_MAX else None
    except ValueError:
        request = None
    if not isinstance(request, dict):
        raise Refused("usage", "a request is one line with a JSON object on standard input")
    return request
