"""The package lock, and the keys of an image."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from image import build
from image.keys import Keys, KeysError, make_keys
from image.lock import LockError, Package, compare, packages_of, read_lock, write_lock

BIRD = Package("bird2", "2.17.1-1", "amd64", "a" * 64)


def test_the_hash_of_a_package_is_that_of_the_file_apt_took_also_with_an_epoch(tmp_path: Path) -> None:
    manifest = tmp_path / "gateway.manifest"
    entry = {"name": "keepalived", "version": "1:2.3.3-1", "architecture": "amd64"}
    manifest.write_text(json.dumps({"packages": [entry]}))
    (tmp_path / "keepalived_1%3a2.3.3-1_amd64.deb").write_bytes(b"deb")
    (package,) = packages_of(manifest, tmp_path)
    assert package.sha256 == hashlib.sha256(b"deb").hexdigest()


def test_a_lock_that_was_written_is_the_lock_that_is_read(tmp_path: Path) -> None:
    path = tmp_path / "packages.lock"
    write_lock(path, {}, [BIRD], "cloud")
    write_lock(path, read_lock(path), [BIRD], "generic")
    assert read_lock(path) == {"cloud": {"bird2": BIRD}, "generic": {"bird2": BIRD}}
    assert compare(read_lock(path), [BIRD], "cloud") == []


@pytest.mark.parametrize(
    ("package", "said"),
    [
        (Package("bird2", "2.17.2-1", "amd64", "b" * 64), "bird2 is 2.17.2-1, the lock has 2.17.1-1"),
        (Package("bird2", "2.17.1-1", "amd64", "b" * 64), "is another file than the locked one"),
    ],
)
def test_another_version_or_another_file_of_the_same_version_is_said(package: Package, said: str) -> None:
    (line,) = compare({"cloud": {"bird2": BIRD}}, [package], "cloud")
    assert said in line


def test_a_package_too_many_and_one_too_few_are_said() -> None:
    other = Package("perl", "5", "amd64", "c" * 64)
    lines = compare({"cloud": {"bird2": BIRD}}, [other], "cloud")
    assert lines == ["perl 5 is not in the lock", "bird2 2.17.1-1 is not in the image"]


def test_a_damaged_lock_is_said_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "packages.lock"
    path.write_text("# what\ncloud bird2 2.17\n")
    with pytest.raises(LockError, match=r"packages\.lock:2: five words"):
        read_lock(path)


def test_a_build_with_other_packages_says_so_and_with_locked_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "BUILD", tmp_path)
    monkeypatch.setattr(build, "LOCK", tmp_path / "packages.lock")
    write_lock(tmp_path / "packages.lock", {}, [BIRD], "cloud")
    paths = build.Paths("cloud", "9.9")
    paths.output.mkdir()
    entry = {"name": "bird2", "version": "2.18-1", "architecture": "amd64"}
    paths.image.with_suffix(".manifest").write_text(json.dumps({"packages": [entry]}))
    build.check_lock(paths, locked=False)
    assert "1 packages differ from image/packages.lock" in capsys.readouterr().out
    with pytest.raises(build.BuildError, match=r"bird2 is 2\.18-1, the lock has 2\.17\.1-1"):
        build.check_lock(paths, locked=True)


def test_the_lock_of_this_repository_names_every_package_with_a_hash_and_no_server() -> None:
    lock = read_lock(build.LOCK)
    assert {"keepalived", "openssh-server", "systemd-boot"} <= set(lock["cloud"])
    assert all(len(package.sha256) == 64 for one in lock.values() for package in one.values())
    assert "://" not in build.LOCK.read_text()


# ---- keys


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys") / "made")


def test_checksums_are_signed_as_the_gateway_will_check_them(keys: Keys, tmp_path: Path) -> None:
    sums = tmp_path / "SHA256SUMS"
    sums.write_text(f"{'0' * 64}  gateway_1.efi\n")
    signature = keys.sign(sums)
    assert signature is not None
    keys.public_tree(tmp_path)
    ring = tmp_path / "usr/share/dsnat/updates.gpg"
    argv = ["gpg", "--batch", "--no-options", "--homedir", str(tmp_path), "--no-default-keyring"]
    argv += ["--keyring", str(ring), "--trust-model", "always", "--verify", str(signature), str(sums)]
    assert subprocess.run(argv, capture_output=True).returncode == 0
    sums.write_text(f"{'1' * 64}  gateway_1.efi\n")
    assert subprocess.run(argv, capture_output=True).returncode != 0
    assert b"PRIVATE" not in ring.read_bytes()


def test_the_same_keys_are_no_reason_to_build_again(keys: Keys) -> None:
    assert keys.fingerprint() == Keys(keys.folder).fingerprint() != ""


def test_half_a_pair_of_secure_boot_keys_is_refused(keys: Keys, tmp_path: Path) -> None:
    shutil.copy(keys.folder / "secure-boot.key", tmp_path)
    with pytest.raises(KeysError, match="belong together"):
        Keys(tmp_path).check()


def test_a_folder_without_keys_is_refused_with_how_to_make_some(tmp_path: Path) -> None:
    with pytest.raises(KeysError, match=r"image\.keys make"):
        Keys(tmp_path).check()


def test_keys_are_never_overwritten(keys: Keys) -> None:
    with pytest.raises(KeysError, match="never overwritten"):
        make_keys(keys.folder)
