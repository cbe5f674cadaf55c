"""What would change: `(wanted, running) -> Plan`. Pure; what runs is a value that somebody fetched before.

A plan says what will differ and nothing else: a file that stays is not named, the same difference on many
gateways is shown once, secrets are never shown, and the bill of sessions that would have to drain comes
first. Its hash covers what was wanted and what was found, so a push that finds something else knows that
the plan is stale.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from provision.agent.disk import digest_of_files
from provision.agent.services import actions_between
from provision.render import MANAGEMENT, Rendered


@dataclass(frozen=True)
class Running:
    """What a gateway said about itself (the agent's `facts`)."""

    gateway: str
    facts: Mapping[str, Any]

    @property
    def generation(self) -> int:
        return int(self.facts["generation"])

    @property
    def files(self) -> Mapping[str, Mapping[str, str]]:
        found: Mapping[str, Mapping[str, str]] = self.facts.get("files", {})
        return found

    @property
    def state(self) -> str:
        return str(self.facts.get("state", "idle"))

    @property
    def drift(self) -> tuple[str, ...]:
        """Files that are not what was pushed: edited in place, or changed by a command on the gateway."""
        manifest = self.facts.get("manifest", {})
        by_hand = (f"{name} (by {manifest.get('owner')})" for name in manifest.get("by_hand", ()))
        return (*self.facts.get("drift", ()), *by_hand)

    def holds(self, addresses: tuple[str, ...] | list[str]) -> int:
        """How many of these addresses the kernel has now: all of them on a master, none on a backup."""
        own = {a for listed in self.facts.get("addresses", {}).values() for a in listed}
        return sum(a in own for a in addresses)


@dataclass(frozen=True)
class FileChange:
    name: str
    kind: str  # added, removed, changed
    diff: tuple[str, ...]


@dataclass(frozen=True)
class Change:
    """What a push would do to one gateway."""

    gateway: str
    base: int
    digest: str  # of all wanted files
    files: tuple[FileChange, ...]
    actions: tuple[str, ...]
    impact: tuple[str, ...] = ()
    drift: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for the same change on another gateway."""
        return tuple((f.name, f.kind, f.diff) for f in self.files), self.actions, self.drift


@dataclass(frozen=True)
class Plan:
    changes: tuple[Change, ...] = ()
    unchanged: tuple[str, ...] = ()
    hash: str = ""

    def groups(self) -> list[list[Change]]:
        found: dict[tuple[object, ...], list[Change]] = {}
        for change in self.changes:
            found.setdefault(change.key, []).append(change)
        return list(found.values())

    def as_json(self) -> dict[str, object]:
        return {
            "hash": self.hash,
            "unchanged": list(self.unchanged),
            "changes": [
                {
                    "gateway": c.gateway,
                    "base": c.base,
                    "digest": c.digest,
                    "actions": list(c.actions),
                    "impact": list(c.impact),
                    "drift": list(c.drift),
                    "files": [{"name": f.name, "kind": f.kind, "diff": list(f.diff)} for f in c.files],
                }
                for c in self.changes
            ],
        }


def plan(wanted: Mapping[str, Rendered], running: Mapping[str, Running]) -> Plan:
    """Gateways in the order of `wanted`; one that is not in `running` was not reached and is left out."""
    changes: list[Change] = []
    unchanged: list[str] = []
    for name, rendered in wanted.items():
        if name not in running:
            continue
        change = _change(rendered, running[name])
        if change is None:
            unchanged.append(name)
        else:
            changes.append(change)
    covered = [[c.gateway, c.base, c.digest, sums(running[c.gateway])] for c in changes]
    text = json.dumps(covered, sort_keys=True)
    return Plan(tuple(changes), tuple(unchanged), hashlib.sha256(text.encode()).hexdigest()[:16])


def wanted_sums(rendered: Rendered) -> dict[str, str]:
    return {name: file.sha256 for name, file in rendered.files.items()}


def digest_of(rendered: Rendered) -> str:
    return digest_of_files(wanted_sums(rendered))


def sums(running: Running) -> dict[str, str]:
    return {name: file["sha256"] for name, file in running.files.items()}


def _change(rendered: Rendered, running: Running) -> Change | None:
    want, have = wanted_sums(rendered), sums(running)
    files = tuple(
        _file_change(name, rendered, running)
        for name in sorted(want.keys() | have.keys())
        if want.get(name) != have.get(name)
    )
    if not files:
        return None
    before = {"files": have, "hardware": running.facts.get("manifest", {}).get("hardware")}
    actions = actions_between(before, {"files": want, "hardware": rendered.hardware})
    return Change(
        rendered.gateway,
        running.generation,
        digest_of_files(want),
        files,
        tuple(actions),
        tuple(_impact(rendered, running, actions)),
        running.drift,
    )


def _file_change(name: str, rendered: Rendered, running: Running) -> FileChange:
    old = running.files.get(name)
    new = rendered.files.get(name)
    before = old["text"].splitlines() if old is not None else []
    after = shown(new.text).splitlines() if new is not None else []
    lines = [*difflib.unified_diff(before, after, "running", "wanted", n=1, lineterm="")][2:]
    kind = "added" if old is None else "removed" if new is None else "changed"
    if kind == "changed" and not lines:
        lines = [" (secret changed)"]
    return FileChange(name, kind, tuple(lines))


def shown(text: str) -> str:
    """As the agent shows its files: the passwords are not in a plan."""
    text = re.sub(r"(?m)^(\s*auth_pass\s+)\S.*$", r"\1(secret)", text)
    return re.sub(r"(?m)^[0-9a-fA-F]{64}$", "(secret)", text)  # the key of a pair


def _impact(rendered: Rendered, running: Running, actions: list[str]) -> list[str]:
    """What hosts will notice, worst first."""
    lines: list[str] = []
    want, have = wanted_sums(rendered), sums(running)
    if want.get(MANAGEMENT) != have.get(MANAGEMENT):
        lines.append(
            "the way to it changes: if it cannot be reached at its management address then, it undoes this"
        )
    if "engine-stop" in actions and running.facts.get("units", {}).get("dsnatd") == "active":
        lines.append("the engine restarts: traffic stops for a moment, sessions stay")
    leaving = sessions_leaving(rendered, running)
    if leaving:
        total = sum(leaving.values())
        few = ", ".join(f"{a} ({n})" for a, n in sorted(leaving.items(), key=lambda item: -item[1])[:5])
        lines.append(f"{total} sessions on addresses that leave a pool run out: {few}")
    return lines


def sessions_leaving(rendered: Rendered, running: Running) -> dict[str, int]:
    """address -> live sessions, for addresses that a pool has now and will not have."""
    from ipaddress import IPv4Address

    from provision.values import span

    text = rendered.files["dsnatd.yaml"].text
    kept: list[tuple[int, int]] = []
    for word in re.findall(r"(?m)^      - (?:range: )?([0-9][0-9./-]*)$", text):
        kept.append(span(word))
    found: dict[str, int] = {}
    for pool in running.facts.get("engine", {}).get("pools", {}).get("pools", []):
        for address in pool.get("addresses", []) if isinstance(pool.get("addresses"), list) else []:
            try:
                number, sessions = int(IPv4Address(str(address["address"]))), int(address["sessions"])
            except (KeyError, ValueError, TypeError):
                continue
            if sessions and not any(low <= number <= high for low, high in kept):
                found[str(address["address"])] = sessions
    return found
