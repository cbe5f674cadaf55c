"""What changed between two images: `python -m image.diff OLD.raw NEW.raw` (`make image-diff A=... B=...`).

Both are looked at as they would be booted: the root file system out of its own partition, the packages of
the manifest beside it. Said are packages (new, gone, other version), units that are enabled or not any more,
files (new, gone, other content, other mode) and sizes. Files that differ only in content and belong to a
package whose version changed are counted and not listed, unless --all asks for them.

Exit status: 0 nothing differs, 1 something does, 2 wrong usage, 3 an image or its parts are not there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import stat
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from image.audit import unpack
from image.build import BuildError

EXIT_DIFFERENT = 1
EXIT_NEEDS = 3


@dataclass(frozen=True)
class File:
    """What a file is, besides its name. A link's content is where it leads to."""

    mode: int
    size: int
    content: str

    def __str__(self) -> str:
        return f"{stat.filemode(self.mode)} {self.size}"


@dataclass
class Contents:
    """One image, ready to be compared."""

    name: str
    packages: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, File] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)

    @property
    def units(self) -> set[str]:
        """Enabled units: the links in the .wants and .requires folders of /etc/systemd/system."""
        return {
            Path(name).name
            for name, file in self.files.items()
            if name.startswith("etc/systemd/system/")
            and Path(name).parent.suffix in (".wants", ".requires")
            and stat.S_ISLNK(file.mode)
        }


@dataclass
class Difference:
    packages: list[str] = field(default_factory=list)
    units: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    sizes: list[str] = field(default_factory=list)
    changed_files: int = 0  # same name, other content

    @property
    def nothing(self) -> bool:
        return not (self.packages or self.units or self.files or self.changed_files)


def read_tree(top: Path) -> dict[str, File]:
    found = {}
    for folder, names, files in os.walk(top):
        for name in (*files, *(name for name in names if (Path(folder) / name).is_symlink())):
            path = Path(folder) / name
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                found[str(path.relative_to(top))] = File(mode, 0, str(path.readlink()))
            elif stat.S_ISREG(mode):
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                found[str(path.relative_to(top))] = File(mode, path.stat().st_size, digest)
    return found


def read_image(image: Path) -> Contents:
    manifest = image.with_suffix(".manifest")
    if not image.exists() or not manifest.exists():
        raise BuildError(
            f"{image} and {manifest.name} are not both there; name a .raw file that `make image` made",
            status=3,
        )
    packages = json.loads(manifest.read_text())["packages"]
    sizes = {"disk image": image.stat().st_size, "UKI": image.with_suffix(".efi").stat().st_size}
    download = Path(f"{image}.zst")
    if download.exists():
        sizes["download"] = download.stat().st_size
    return Contents(
        image.name, {p["name"]: p["version"] for p in packages}, read_tree(unpack(image).path), sizes
    )


def both(old: Iterable[str], new: Iterable[str]) -> tuple[list[str], list[str], list[str]]:
    """Gone, new, in both: sorted."""
    before, after = set(old), set(new)
    return sorted(before - after), sorted(after - before), sorted(before & after)


def compare(old: Contents, new: Contents, *, list_all: bool = False) -> Difference:
    found = Difference()
    gone, added, kept = both(old.packages, new.packages)
    found.packages = [f"- {name} {old.packages[name]}" for name in gone]
    found.packages += [f"+ {name} {new.packages[name]}" for name in added]
    found.packages += [
        f"~ {name} {old.packages[name]} -> {new.packages[name]}"
        for name in kept
        if old.packages[name] != new.packages[name]
    ]
    gone, added, _ = both(old.units, new.units)
    found.units = [f"- {name}" for name in gone] + [f"+ {name}" for name in added]
    gone, added, kept = both(old.files, new.files)
    found.files = [f"- {name} ({old.files[name]})" for name in gone]
    found.files += [f"+ {name} ({new.files[name]})" for name in added]
    for name in kept:
        before, after = old.files[name], new.files[name]
        if before.mode != after.mode:
            found.files.append(f"~ {name} {stat.filemode(before.mode)} -> {stat.filemode(after.mode)}")
        elif before.content != after.content:
            found.changed_files += 1
            # In a release nearly every library changes; these are the ones that somebody here wrote.
            if list_all or name.startswith(("etc/", "usr/lib/dsnat/", "usr/lib/systemd/system/")):
                found.files.append(f"~ {name} {before.size} -> {after.size} bytes")
    for name in sorted(set(old.sizes) & set(new.sizes)):
        before_size, after_size = old.sizes[name], new.sizes[name]
        found.sizes.append(
            f"{name}: {before_size / 1e6:.1f} -> {after_size / 1e6:.1f} MB"
            f" ({(after_size - before_size) / 1e6:+.1f})"
        )
    return found


def show(old: Contents, new: Contents, found: Difference) -> str:
    lines = [f"{old.name} -> {new.name}"]
    for title, entries in (("packages", found.packages), ("units", found.units), ("files", found.files)):
        lines.append(f"{title}: {len(entries) or 'no difference'}")
        lines += [f"  {entry}" for entry in entries]
    lines.append(f"files of the same name with other content: {found.changed_files}")
    return "\n".join([*lines, *(f"{entry}" for entry in found.sizes)])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m image.diff", description="What changed between two images."
    )
    parser.add_argument("old", type=Path, help="a .raw file, with what make image puts beside it")
    parser.add_argument("new", type=Path)
    parser.add_argument("--all", action="store_true", help="list every file whose content differs")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    try:
        old, new = read_image(options.old), read_image(options.new)
    except BuildError as error:
        print(f"diff: {error}", file=sys.stderr)
        return EXIT_NEEDS
    found = compare(old, new, list_all=options.all)
    print(json.dumps(asdict(found), indent=1) if options.json else show(old, new, found))
    return 0 if found.nothing else EXIT_DIFFERENT


if __name__ == "__main__":
    sys.exit(main())
