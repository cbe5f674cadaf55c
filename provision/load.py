"""`fleet.yaml` -> `Fleet`, or every error at once.

The text is composed into nodes that still know their line and column; this module makes plain data
of them itself, so that none of YAML's surprises gets in: `no` stays a word, `52:54:00:12:34:56` stays
a MAC address, `012` is twelve, a date is text, and the same key twice is an error that names both
lines. pydantic then checks the data, and each of its complaints is led back to the node it is about.

An error reads `FILE:LINE:COL: PATH: what; what to do`, followed by the line itself and a caret. Included
files (`include:`, relative to the file that names them) add entries to the top-level maps; a name given
twice is an error with both places, whichever files they stand in.
"""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from provision.model import Fleet
from provision.names import unknown_names

Loc = tuple[str | int, ...]

BYTES_MAX = 16 << 20
NODES_MAX = 500_000  # an alias that is used over and over counts each time
MERGED = ("sites", "jumps", "users", "pools", "clusters", "pairs", "gateways")


@dataclass(frozen=True, order=True)
class Problem:
    """One sentence about one place."""

    file: str
    line: int
    column: int
    path: str
    text: str
    source: str = field(default="", compare=False)
    warning: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}:{self.column}: " if self.line else f"{self.file}: "
        path = f"{self.path}: " if self.path else ""
        head = f"{where}{'warning: ' if self.warning else ''}{path}{self.text}"
        if not self.source.strip():
            return head
        return f"{head}\n    {self.source}\n    {' ' * (self.column - 1)}^"

    def as_json(self) -> dict[str, object]:
        return {
            "file": self.file,
            "line": self.line,
            "column": self.column,
            "path": self.path,
            "text": self.text,
            "severity": "warning" if self.warning else "error",
        }


class InvalidFleet(Exception):
    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = sorted(set(problems))
        super().__init__("\n".join(map(str, self.problems)))


class Source:
    """Where things stand: leads a path in the data back to a line and column."""

    def __init__(self, root: MappingNode, texts: dict[str, list[str]], name: str) -> None:
        self._root = root
        self._texts = texts
        self._name = name
        self.data: Any = {}

    def problem(
        self, loc: Loc, text: str, *, key: bool = False, other: Loc | None = None, warning: bool = False
    ) -> Problem:
        """`key`: point at the name, not at the value. `other`: a second place, named in the sentence."""
        file, line, column = self._mark(loc, key)
        if other is not None:
            text = "{} (the other is at {}:{}:{})".format(text, *self._mark(other, key))
        lines = self._texts.get(file, [])
        source = lines[line - 1] if 0 < line <= len(lines) else ""
        return Problem(file, line, column, _path(loc), text, source.replace("\t", " "), warning)

    def place(self, loc: Loc, *, key: bool = True) -> str:
        return "{}:{}:{}".format(*self._mark(loc, key))

    def _mark(self, loc: Loc, key: bool) -> tuple[str, int, int]:
        node: Node = self._root
        found = self._root.start_mark
        for depth, step in enumerate(loc):
            last = depth == len(loc) - 1
            if isinstance(node, MappingNode):
                pair = next(
                    ((k, v) for k, v in node.value if isinstance(k, ScalarNode) and k.value == str(step)),
                    None,
                )
                if pair is None:
                    break
                found = pair[0].start_mark if last and key else pair[1].start_mark
                node = pair[1]
                if not last and loc[depth + 1] == "[key]":
                    found = pair[0].start_mark
                    break
            elif isinstance(node, SequenceNode) and isinstance(step, int) and step < len(node.value):
                node = node.value[step]
                found = node.start_mark
            else:
                break  # pydantic adds steps of its own inside unions
        if found is None:
            return self._name, 0, 0
        return found.name, found.line + 1, found.column + 1


def load(path: Path) -> tuple[Fleet, Source]:
    """Reads the file and what it includes. Raises InvalidFleet with all that is wrong in form."""
    texts: dict[str, list[str]] = {}
    problems: list[Problem] = []
    root = _read(path, texts, problems, seen=[])
    if root is None:
        raise InvalidFleet(problems)
    source = Source(root, texts, str(path))
    source.data = data = _Builder(source, problems).build(root)
    try:
        fleet = Fleet.model_validate_json(json.dumps(data))
    except ValidationError as error:
        problems += [*_explain(error, source), *unknown_names(data, source)]
        raise InvalidFleet(problems) from None
    if problems:
        raise InvalidFleet(problems)
    return fleet, source


def slices_file(path: Path) -> Path:
    """Beside fleet.yaml: what each member of a cluster had when it was divided last."""
    return path.with_name(f"{path.stem}.slices.yaml")


def replace_text(path: Path, text: str) -> None:
    """The whole new text or the old one. A link stays a link: what it leads to is replaced."""
    path = path.resolve()
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    if path.exists():
        new.chmod(path.stat().st_mode & 0o777)
    new.replace(path)


def _read(
    path: Path, texts: dict[str, list[str]], problems: list[Problem], seen: list[Path]
) -> MappingNode | None:
    name = str(path)

    def fail(text: str, line: int = 0, column: int = 0) -> None:
        lines = texts.get(name, [])
        problems.append(
            Problem(name, line, column, "", text, lines[line - 1] if 0 < line <= len(lines) else "")
        )

    try:
        raw = path.read_bytes()
    except OSError as error:
        fail(f"cannot be read ({error.strerror}); name an existing file with --file")
        return None
    if len(raw) > BYTES_MAX:
        fail(f"is larger than {BYTES_MAX >> 20} MiB; split it with include:")
        return None
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        fail(
            f"is not UTF-8 text (byte {error.start}); save it as such", raw[: error.start].count(b"\n") + 1, 1
        )
        return None
    texts[name] = text.splitlines()
    try:
        root = _compose(text, name)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = (error.problem or error.context or "this is not YAML").strip()
        if what.startswith("but ") and error.context:  # the second half of a sentence
            what = f"{error.context}, {what}"
        if "'\\t'" in what:
            what += "; indent with spaces"
        fail(f"not valid YAML: {what}", mark.line + 1 if mark else 0, mark.column + 1 if mark else 0)
        return None
    except (YAMLError, RecursionError) as error:
        fail(f"not valid YAML: {str(error).splitlines()[0]}")
        return None
    if root is None:
        fail("is empty; it starts with schema: 1, README.md shows the rest")
        return None
    if not isinstance(root, MappingNode):
        fail("must be a map of keys such as schema:, pools: and gateways:", root.start_mark.line + 1, 1)
        return None
    _include(path, root, texts, problems, [*seen, path.resolve()])
    kept = slices_file(path)
    if not seen and kept.exists():
        part = _read(kept, texts, problems, [path.resolve()])
        if part is not None:
            root.value.extend(entry for entry in part.value if entry[0].value == "slices")
    return root


def _compose(text: str, name: str) -> Node | None:
    reader = YAML(typ="safe", pure=True)
    reader.allow_duplicate_keys = True  # ours is the better message
    stream = _Named(text, name)
    node = reader.compose(stream)
    return typing.cast("Node | None", node)


class _Named:
    """A stream with a name, so that the marks carry it."""

    def __init__(self, text: str, name: str) -> None:
        self.name = name
        self._rest = text

    def read(self, size: int = -1) -> str:
        cut = len(self._rest) if size < 0 else size
        out, self._rest = self._rest[:cut], self._rest[cut:]
        return out


def _include(
    path: Path, root: MappingNode, texts: dict[str, list[str]], problems: list[Problem], seen: list[Path]
) -> None:
    """Adds the entries of included files to the maps of `root`."""
    listed = next((v for k, v in root.value if isinstance(k, ScalarNode) and k.value == "include"), None)
    if not isinstance(listed, SequenceNode):
        return
    for item in listed.value:
        if not isinstance(item, ScalarNode):
            continue  # the model says what it should be
        mark = item.start_mark
        line, column, text = mark.line + 1, mark.column + 1, texts[str(path)][mark.line]
        try:
            found = [Path(item.value)] if item.value.startswith("/") else sorted(path.parent.glob(item.value))
        except (
            ValueError,
            IndexError,
        ):  # "", ".", "a**b": what pathlib takes for no pattern depends on its age
            found = []
        if not found:
            what = f"no file matches {item.value}; the name is relative to {path.name}"
            problems.append(Problem(str(path), line, column, "include", what, text))
        for file in found:
            if file.resolve() in seen:
                what = f"{file} includes itself; remove one of the two"
                problems.append(Problem(str(path), line, column, "include", what, text))
                continue
            part = _read(file, texts, problems, seen)
            if part is not None:
                _merge(root, part, file, texts, problems)


def _merge(
    root: MappingNode, part: MappingNode, file: Path, texts: dict[str, list[str]], problems: list[Problem]
) -> None:
    for key, value in part.value:
        if key.value == "include":
            continue
        if key.value not in MERGED or not isinstance(value, MappingNode):
            mark = key.start_mark
            what = f"an included file may hold the maps {', '.join(MERGED)}; move this to the main file"
            problems.append(
                Problem(
                    str(file),
                    mark.line + 1,
                    mark.column + 1,
                    str(key.value),
                    what,
                    texts[str(file)][mark.line],
                )
            )
            continue
        own = next((v for k, v in root.value if k.value == key.value and isinstance(v, MappingNode)), None)
        if own is None:
            root.value.append((key, value))
        else:
            own.value.extend(value.value)  # the builder finds names that are given twice


_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS = {"true": True, "false": False, "True": True, "False": False, "null": None, "~": None, "": None}


def _scalar(node: ScalarNode) -> Any:
    """YAML 1.2's core schema, less hex and octal: only what is surely meant."""
    text = str(node.value)
    if node.style is not None:
        return text
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text) and len(text) < 19:
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


class _Builder:
    def __init__(self, source: Source, problems: list[Problem]) -> None:
        self._source = source
        self._problems = problems
        self._count = 0

    def build(self, node: Node, path: Loc = (), above: tuple[int, ...] = ()) -> Any:
        self._count += 1
        if id(node) in above or self._count > NODES_MAX:
            if self._count <= NODES_MAX + 1:
                self._problems.append(
                    self._source.problem(path, "an alias leads back to itself or makes the file too large")
                )
            return None
        above = (*above, id(node))
        if isinstance(node, ScalarNode):
            if node.tag and not str(node.tag).startswith("tag:yaml.org,2002:"):
                self._problems.append(
                    self._source.problem(path, f"the tag {node.tag} is not known; write the plain value")
                )
            return _scalar(node)
        if isinstance(node, SequenceNode):
            return [self.build(item, (*path, i), above) for i, item in enumerate(node.value)]
        assert isinstance(node, MappingNode)
        data: dict[str, Any] = {}
        first: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, ScalarNode):
                self._problems.append(self._source.problem(path, "a key must be a word"))
                continue
            name = str(key.value)
            mark = key.start_mark
            if name in first:
                was = first[name]
                text = (
                    f'"{name}" is given twice; remove or rename one '
                    f"(the other is at {was.name}:{was.line + 1}:{was.column + 1})"
                )
                at = Problem(
                    mark.name, mark.line + 1, mark.column + 1, _path((*path, name)), text, self._line(mark)
                )
                self._problems.append(at)
                continue
            first[name] = mark
            data[name] = self.build(value, (*path, name), above)
            if data[name] is None and not isinstance(value, (MappingNode, SequenceNode)):
                del data[name]  # `key:` with nothing after it is the same as no key
        return data

    def _line(self, mark: Any) -> str:
        lines = self._source._texts.get(mark.name, [])
        return lines[mark.line] if mark.line < len(lines) else ""


def _explain(error: ValidationError, source: Source) -> Iterable[Problem]:
    for item in error.errors(include_url=False):
        loc, kind, given = item["loc"], item["type"], item.get("input")
        context = item.get("ctx", {})
        if kind == "extra_forbidden":
            known = _keys_at(loc[:-1])
            guess = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.6)
            hint = f'did you mean "{guess[0]}"?' if guess else f"known here: {', '.join(sorted(known))}"
            yield source.problem(loc, f'unknown key "{loc[-1]}"; {hint}', key=True)
        elif kind == "missing":
            where = source.problem(loc[:-1], f'"{loc[-1]}" is missing; add it', key=True)
            yield where
        elif kind == "literal_error":
            allowed = str(context["expected"]).replace("'", "").replace(" or ", ", ")
            guess = difflib.get_close_matches(str(given), allowed.split(", "), n=1, cutoff=0.5)
            hint = f"; did you mean {guess[0]}?" if guess else ""
            yield source.problem(loc, f'"{given}" is not one of: {allowed}{hint}')
        elif kind in ("value_error", "assertion_error"):
            yield source.problem(loc, str(context.get("error", item["msg"])))
        elif kind == "too_short" and given:
            continue  # its entries were wrong, and each was named
        elif kind in _SENTENCES:
            yield source.problem(loc, _SENTENCES[kind].format(given=_shown(given), **context))
        else:
            yield source.problem(loc, item["msg"])


_SENTENCES = {
    "int_type": "{given} is not a whole number",
    "int_from_float": "{given} is not a whole number",
    "bool_type": "{given} is neither true nor false",
    "string_type": "{given} is not text; put it in quotes",
    "ip_v4_address": "{given} is not an IPv4 address",
    "greater_than_equal": "{given} is too small; the least is {ge}",
    "less_than_equal": "{given} is too large; the most is {le}",
    "too_short": "this must have at least {min_length} entry",
    "model_type": "{given} stands where a map of keys is expected",
    "model_attributes_type": "{given} stands where a map of keys is expected",
    "dict_type": "{given} stands where a map of names is expected",
    "tuple_type": "{given} stands where a list is expected",
}


def _shown(value: object) -> str:
    if isinstance(value, str):
        return f'"{value}"' if len(value) < 60 else f'"{value[:57]}..."'
    if isinstance(value, (dict, list)):
        return "a map" if isinstance(value, dict) else "a list"
    return "nothing" if value is None else json.dumps(value)


def _keys_at(loc: Loc) -> list[str]:
    """The keys that the model knows at this place."""
    kind: Any = Fleet
    for step in loc:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            fields = kind.model_fields
            known = {info.alias or name: info.annotation for name, info in fields.items()}
            kind = _plain(known.get(str(step)))
        else:
            arguments = typing.get_args(kind)
            kind = (
                _plain(arguments[-1] if typing.get_origin(kind) is dict else arguments[0])
                if arguments
                else None
            )
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [info.alias or name for name, info in kind.model_fields.items()]
    return []


def _plain(kind: Any) -> Any:
    """`X | None` and `Annotated[X, ...]` -> X."""
    while True:
        origin = typing.get_origin(kind)
        if origin is typing.Annotated:
            kind = typing.get_args(kind)[0]
        elif origin in (typing.Union, types.UnionType):
            kind = next(a for a in typing.get_args(kind) if a is not type(None))
        else:
            return kind


def _path(loc: Loc) -> str:
    return ".".join(str(step) for step in loc if step != "[key]")
