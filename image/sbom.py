"""What is in the image, as a CycloneDX bill of materials, for whoever must know when a flaw is found in one
of it.

Debian's packages come from mkosi's manifest; our own programs are listed with the build id that is also in
the program itself, so that a file found on a gateway can be matched to the release it came from. The same
image gives the same bytes: the document carries no date, and its serial number is made from its content.
"""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import quote

from elftools.elf.elffile import ELFFile
from elftools.elf.sections import NoteSection

NAMESPACE = uuid.UUID("7d3f0b6e-6a0b-4f5c-9d7e-0c1a2b3c4d5e")  # the image's Seed=


def build_id(path: Path) -> str:
    with path.open("rb") as file:
        for section in ELFFile(file).iter_sections():
            if isinstance(section, NoteSection):
                for note in section.iter_notes():
                    if note["n_type"] == "NT_GNU_BUILD_ID":
                        return str(note["n_desc"])
    return ""


def package(entry: dict[str, str], release: str) -> dict[str, Any]:
    name, version, architecture = entry["name"], entry["version"], entry["architecture"]
    address = (
        f"pkg:deb/debian/{quote(name)}@{quote(version, safe='')}?arch={architecture}&distro=debian-{release}"
    )
    return {"type": "library", "bom-ref": address, "name": name, "version": version, "purl": address}


def program(symbols: Path, version: str) -> dict[str, Any]:
    name = symbols.stem
    return {
        "type": "application",
        "bom-ref": f"{name}@{version}",
        "name": name,
        "version": version,
        "licenses": [{"license": {"id": "GPL-2.0-or-later"}}],
        "properties": [{"name": "build-id", "value": build_id(symbols)}],
    }


def write_sbom(manifest: Path, version: str, release: str, to: Path) -> None:
    """`manifest` is mkosi's; the symbols of our programs (NAME.debug) are beside it."""
    packages = json.loads(manifest.read_text())["packages"]
    components = [package(entry, release) for entry in sorted(packages, key=lambda entry: str(entry["name"]))]
    components += [program(path, version) for path in sorted(manifest.parent.glob("*.debug"))]
    content = json.dumps(components, sort_keys=True)
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": f"urn:uuid:{uuid.uuid5(NAMESPACE, content)}",
        "version": 1,
        "metadata": {"component": {"type": "operating-system", "name": "gateway", "version": version}},
        "components": components,
    }
    to.write_text(json.dumps(document, indent=1) + "\n")
