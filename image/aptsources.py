"""The machine's own Debian package sources, moved to another release.

The image and the tools tree are Debian 13, the build machine may be Debian 12. Both come from the place
that the machine's administrator already trusts: the entries of /etc/apt are read, those of the Debian
archive kept, and only their suite is changed. No host name of a mirror is written anywhere in this
repository.

Kept: entries of type deb with component main that the Debian archive key signs, or whose address ends in
"debian" or "debian-security". Dropped: third parties, source packages, backports, proposed updates.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DEBIAN_SUITES = (
    "bullseye",
    "bookworm",
    "trixie",
    "forky",
    "sid",
    "oldstable",
    "stable",
    "testing",
    "unstable",
)
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
# What the administrator said about reaching the archive; the rest of apt's configuration is the image's own.
TRANSPORT_KEYS = re.compile(
    r'^Acquire::(?:(?:http|https|ftp)::(?:[^:"]+::)?(?:Proxy|Proxy-Auto-Detect|Timeout|Verify-Peer|CAInfo)'
    r"|Retries|Check-Valid-Until|Check-Date) "
)


class SourcesError(Exception):
    """The machine's package sources cannot serve the release; the text says why and what to do."""


@dataclass(frozen=True)
class Source:
    """One place with the suites it serves, as one stanza of a .sources file."""

    uri: str
    suites: tuple[str, ...]

    def one_line(self) -> list[str]:
        return [f"deb [signed-by={KEYRING}] {self.uri} {suite} main" for suite in self.suites]

    def stanza(self) -> str:
        suites = " ".join(self.suites)
        return f"Types: deb\nURIs: {self.uri}\nSuites: {suites}\nComponents: main\nSigned-By: {KEYRING}\n"


@dataclass(frozen=True)
class _Entry:
    uri: str
    suite: str
    components: tuple[str, ...]
    signed_by: str


def _one_line_entries(text: str) -> Iterator[_Entry]:
    for line in text.splitlines():
        line = line.split("#", 1)[0].strip()
        match = re.match(
            r"deb\s+(?:\[(?P<options>[^]]*)\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)\s*(?P<components>.*)$", line
        )
        if match:
            signed = re.search(r"signed-by=(\S+)", match["options"] or "")
            yield _Entry(
                match["uri"], match["suite"], tuple(match["components"].split()), signed[1] if signed else ""
            )


def _stanza_entries(text: str) -> Iterator[_Entry]:
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    for stanza in re.split(r"\n\s*\n", "\n".join(lines)):
        fields: dict[str, str] = {}
        key = ""
        for line in stanza.splitlines():
            if line[:1].isspace():
                fields[key] = f"{fields.get(key, '')} {line.strip()}"
            elif ":" in line:
                key, _, value = line.partition(":")
                key = key.strip().lower()
                fields[key] = value.strip()
        if (
            fields.get("enabled", "yes").lower() in ("no", "false", "0")
            or "deb" not in fields.get("types", "").split()
        ):
            continue
        for uri in fields.get("uris", "").split():
            for suite in fields.get("suites", "").split():
                yield _Entry(
                    uri, suite, tuple(fields.get("components", "").split()), fields.get("signed-by", "")
                )


def _entries(apt: Path) -> Iterator[_Entry]:
    lists = [apt / "sources.list", *sorted((apt / "sources.list.d").glob("*.list"))]
    for path in lists:
        if path.is_file():
            yield from _one_line_entries(path.read_text())
    for path in sorted((apt / "sources.list.d").glob("*.sources")):
        yield from _stanza_entries(path.read_text())


def _resolve(uri: str) -> str:
    """Cloud images name their mirror in a file (mirror+file:/etc/apt/mirrors/...); inside a build it is not
    there.
    """
    for scheme in ("mirror+file:", "mirror:file:"):
        if uri.startswith(scheme):
            listed = Path("/" + uri.removeprefix(scheme).lstrip("/")).read_text().split()
            if listed:
                return listed[0]
    return uri


def _is_debian(entry: _Entry) -> bool:
    if "main" not in entry.components:
        return False
    if "debian-archive" in entry.signed_by:
        return True
    return not entry.signed_by and entry.uri.rstrip("/").rsplit("/", 1)[-1] in ("debian", "debian-security")


def debian_sources(release: str, apt: Path = Path("/etc/apt")) -> list[Source]:
    """The machine's Debian entries with their suite changed to `release`, `release`-updates,
    `release`-security.
    """
    found: dict[str, list[str]] = {}
    for entry in _entries(apt):
        base, _, pocket = entry.suite.replace("/", "-").partition("-")
        if base not in DEBIAN_SUITES or pocket not in ("", "updates", "security") or not _is_debian(entry):
            continue
        suite = f"{release}-{pocket}" if pocket else release
        suites = found.setdefault(_resolve(entry.uri), [])
        if suite not in suites:
            suites.append(suite)
    if not any(release in suites for suites in found.values()):
        raise SourcesError(
            f"{apt}: no entry of the Debian archive with component main; "
            "add one to sources.list.d (any release will do)"
        )
    return [Source(uri, tuple(suites)) for uri, suites in found.items()]


def transport_options() -> list[str]:
    """apt options of this machine that say how to reach the archive (proxy, retries, dates), as lines of
    apt.conf.
    """
    dump = subprocess.run(["apt-config", "dump"], check=True, capture_output=True, text=True).stdout
    return [line for line in dump.splitlines() if TRANSPORT_KEYS.match(line) and not line.endswith('"";')]
