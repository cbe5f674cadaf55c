"""The flasher: what it refuses, and that what it wrote is what it was given (on a loop device)."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from image import flash
from tests.lab import run

MIB = 1 << 20


def block_map(image: Path) -> Path:
    """The map of an image of which the first and the third MiB hold data."""
    data = image.read_bytes()
    ranges = ""
    for first, last in ((0, 255), (512, 767)):
        digest = hashlib.sha256(data[first * 4096 : (last + 1) * 4096]).hexdigest()
        ranges += f'<Range chksum="{digest}">{first}-{last}</Range>'
    text = (
        '<?xml version="1.0" ?>\n<bmap version="2.0">\n'
        f"<ImageSize> {len(data)} </ImageSize><BlockSize> 4096 </BlockSize><BlocksCount> {len(data) // 4096} "
        "</BlocksCount><MappedBlocksCount> 512 </MappedBlocksCount><ChecksumType> sha256 </ChecksumType>"
        f"<BmapFileChecksum> {'0' * 64} </BmapFileChecksum><BlockMap>{ranges}</BlockMap></bmap>\n"
    )
    sealed = text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest())
    path = image.with_suffix(".bmap")
    path.write_text(sealed)
    return path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "gateway.raw"
    path.write_bytes(os.urandom(MIB) + bytes(MIB) + os.urandom(MIB) + bytes(MIB))
    block_map(path)
    return path


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.write_bytes(b"")
    os.truncate(disk, 600 * MIB)
    with ExitStack() as undo:
        path = Path(run(["losetup", "-f", "--show", str(disk)]).strip())
        undo.callback(run, ["losetup", "-d", str(path)])
        yield path


def command(device: Path, image: Path, *more: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "image.flash", str(device), "--image", str(image), *more]
    return subprocess.run(argv, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)


def confirmed(device: Path) -> tuple[str, str]:
    return "--confirm", device.name[-4:]


@pytest.mark.net
def test_a_flashed_disk_holds_the_image_and_was_read_back(device: Path, image: Path) -> None:
    done = command(device, image, *confirmed(device))
    assert done.returncode == 0, done.stderr
    assert "were written and compared" in done.stdout
    with device.open("rb") as disk:
        assert disk.read(4 * MIB)[: 3 * MIB] == image.read_bytes()[: 3 * MIB]


@pytest.mark.net
def test_a_compressed_image_is_streamed(device: Path, image: Path) -> None:
    run(["zstd", "-q", str(image)])
    done = command(device, image.with_suffix(".raw.zst"), *confirmed(device))
    assert done.returncode == 0, done.stderr
    with device.open("rb") as disk:
        assert disk.read(MIB) == image.read_bytes()[:MIB]


@pytest.mark.net
def test_without_an_answer_nothing_is_written(device: Path, image: Path) -> None:
    for more in ((), ("--confirm", "no")):
        done = command(device, image, *more)
        assert done.returncode == flash.EXIT_REFUSED
    with device.open("rb") as disk:
        assert disk.read(4 * MIB) == bytes(4 * MIB)


@pytest.mark.net
def test_an_image_that_is_not_what_its_map_says_is_not_taken(device: Path, image: Path) -> None:
    data = bytearray(image.read_bytes())
    data[5000] ^= 1
    image.write_bytes(data)
    done = command(device, image, *confirmed(device))
    assert done.returncode == flash.EXIT_FAILED
    assert "the disk does not boot now, run this again" in done.stderr


@pytest.mark.net
def test_a_disk_that_gives_back_other_data_is_found_out(device: Path, image: Path) -> None:
    assert command(device, image, *confirmed(device)).returncode == 0
    with device.open("r+b", buffering=0) as disk:
        disk.seek(2 * MIB + 77)
        disk.write(b"\0\0\0\0")
        os.fsync(disk.fileno())
    with pytest.raises(flash.FlashError, match=r"gives back other data than was written in blocks 512-767"):
        flash.compare(flash.find_block_map(image), flash.Disk(device, "", "", 600 * MIB))


@pytest.mark.net
def test_a_mounted_disk_is_refused(device: Path, image: Path, tmp_path: Path) -> None:
    run(["mkfs.ext4", "-q", str(device)])
    place = tmp_path / "mounted"
    place.mkdir()
    run(["mount", str(device), str(place)])
    try:
        done = command(device, image, *confirmed(device))
    finally:
        run(["umount", str(place)])
    assert done.returncode == flash.EXIT_REFUSED
    assert f"is in use at {place}" in done.stderr


@pytest.mark.net
def test_a_disk_that_is_too_small_is_refused(device: Path) -> None:
    with pytest.raises(flash.FlashError, match="take a larger disk"):
        flash.examine(device, 601 * MIB)


def test_what_is_not_a_disk_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(flash.FlashError, match="is not a block device") as caught:
        flash.examine(tmp_path / "file", 0)
    assert caught.value.status == flash.EXIT_REFUSED


def test_an_image_without_a_block_map_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.raw").write_bytes(b"")
    with pytest.raises(flash.FlashError, match=r"copy the \.bmap file along"):
        flash.find_block_map(tmp_path / "x.raw")


def test_the_host_key_goes_into_the_inventory_and_remarks_stay(tmp_path: Path) -> None:
    kept, fleet = tmp_path / "kept.yaml", tmp_path / "fleet.yaml"
    kept.write_text("gateways:\n  gw1:  # in the cellar\n    host_key: ssh-ed25519 OLD\n")
    kept.chmod(0o640)
    fleet.symlink_to(kept)
    flash.record_host_key(fleet, "gw1", "ssh-ed25519 NEW someone@somewhere\n")
    assert fleet.is_symlink(), "a file that is kept elsewhere stays there"
    assert kept.stat().st_mode & 0o777 == 0o640
    assert kept.read_text() == "gateways:\n  gw1:  # in the cellar\n    host_key: ssh-ed25519 NEW\n"


def test_a_gateway_that_the_inventory_does_not_know_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text("gateways: {}\n")
    with pytest.raises(flash.FlashError, match="has no gateway gw1; add it first"):
        flash.record_host_key(fleet, "gw1", "", only_check=True)


def test_an_inventory_that_is_no_yaml_is_refused_in_a_sentence(tmp_path: Path) -> None:
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text("gateways: {\n")
    with pytest.raises(flash.FlashError, match="is not valid YAML"):
        flash.record_host_key(fleet, "gw1", "", only_check=True)
