"""packages.lock: name, version and hash of every Debian package in the image.

One line a package, `flavour name version architecture sha256`, for each flavour of the image by itself.
The hash is that of the .deb file which apt took, as it lies in the package cache; apt has
checked it against the archive's signed lists. Which server it came from is not written down: it is another
one on every machine.

The lock is what a release was made of. It is compared after each build (build.py): Debian replaces packages
for security, and an archive that has moved on cannot give the old ones, so a difference is said, and refused
only where the build asks for it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

HEADER = """\
# What the image is made of: flavour, package, version, architecture, SHA-256 of the .deb file.
# Made by `make image-lock`.
"""


class LockError(Exception):
    """One sentence: which line or file, what is wrong, what to do."""


@dataclass(frozen=True, order=True)
class Package:
    name: str
    version: str
    architecture: str
    sha256: str


Lock = dict[str, dict[str, Package]]  # flavour -> name -> package


def packages_of(manifest: Path, archives: Path) -> list[Package]:
    """The packages of mkosi's manifest, each with the hash of its file in the cache."""
    found = []
    for entry in json.loads(manifest.read_text())["packages"]:
        name, version, architecture = entry["name"], entry["version"], entry["architecture"]
        # apt writes an epoch's colon as %3a in file names
        file = archives / f"{name}_{quote(version, safe='+~.-').lower()}_{architecture}.deb"
        if not file.exists():
            file = archives / f"{name}_{version.replace(':', '%3a')}_{architecture}.deb"
        digest = hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else ""
        found.append(Package(name, version, architecture, digest))
    return sorted(found)


def read_lock(path: Path) -> Lock:
    lock: Lock = {}
    if not path.exists():
        return lock
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        words = line.split()
        if len(words) != 5:
            raise LockError(
                f"{path}:{number}: five words belong here, flavour name version architecture sha256; "
                "run `make image-lock`"
            )
        lock.setdefault(words[0], {})[words[1]] = Package(*words[1:])
    return lock


def compare(lock: Lock, packages: Iterable[Package], flavour: str) -> list[str]:
    """What differs, a line each; nothing when the image is made of what the lock says."""
    if flavour not in lock:
        return [f"flavour {flavour} is not in the lock yet"]
    wanted, found = lock[flavour], {package.name: package for package in packages}
    lines = [f"{name} {found[name].version} is not in the lock" for name in sorted(set(found) - set(wanted))]
    lines += [
        f"{name} {wanted[name].version} is not in the image" for name in sorted(set(wanted) - set(found))
    ]
    for name in sorted(set(found) & set(wanted)):
        old, new = wanted[name], found[name]
        if old.version != new.version:
            lines.append(f"{name} is {new.version}, the lock has {old.version}")
        elif new.sha256 and old.sha256 != new.sha256:
            lines.append(f"{name} {new.version} is another file than the locked one: {new.sha256}")
    return lines


def write_lock(path: Path, lock: Lock, packages: Iterable[Package], flavour: str) -> None:
    """Replaces what the lock says of one flavour."""
    packages = list(packages)
    for package in packages:
        if not package.sha256:
            raise LockError(
                f"the .deb file of {package.name} {package.version} is not in the package cache; "
                "run `python -m image.build --force`, which fetches all again, and repeat"
            )
    lock = lock | {flavour: {package.name: package for package in packages}}
    lines = [
        f"{name} {package.name} {package.version} {package.architecture} {package.sha256}\n"
        for name in sorted(lock)
        for package in sorted(lock[name].values())
    ]
    path.write_text(HEADER + "".join(lines))
