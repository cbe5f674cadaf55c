"""The bill of materials, made from a small manifest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from image.sbom import write_sbom

PACKAGES = [
    {"type": "deb", "name": "zstd", "version": "1.5.7+dfsg-1", "architecture": "amd64"},
    {"type": "deb", "name": "keepalived", "version": "1:2.3.3-1", "architecture": "amd64"},
]


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    path = tmp_path / "gateway.manifest"
    path.write_text(json.dumps({"packages": PACKAGES}))
    shutil.copy("/bin/true", tmp_path / "dsnatd.debug")
    return path


def test_packages_have_addresses_that_a_scanner_knows(manifest: Path, tmp_path: Path) -> None:
    write_sbom(manifest, "1.2.3", "trixie", tmp_path / "out")
    document = json.loads((tmp_path / "out").read_text())
    assert document["bomFormat"] == "CycloneDX"
    addresses = [component.get("purl") for component in document["components"]]
    assert "pkg:deb/debian/keepalived@1%3A2.3.3-1?arch=amd64&distro=debian-trixie" in addresses


def test_our_own_programs_are_listed_with_their_build_id(manifest: Path, tmp_path: Path) -> None:
    write_sbom(manifest, "1.2.3", "trixie", tmp_path / "out")
    ours = json.loads((tmp_path / "out").read_text())["components"][-1]
    assert (ours["name"], ours["version"]) == ("dsnatd", "1.2.3")
    assert len(ours["properties"][0]["value"]) == 40


def test_the_same_image_has_the_same_bill_byte_for_byte(manifest: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_sbom(manifest, "1.2.3", "trixie", tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
