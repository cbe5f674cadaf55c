"""What changed between two images, on two small made-up ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from image import diff
from image.audit import Root

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """An image of which only the manifest, the sizes and the unpacked root are real."""

    def image(name: str, packages: dict[str, str], files: dict[str, str]) -> Path:
        folder = tmp_path / name
        for path, text in files.items():
            file = folder / "root" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.symlink_to(text[2:]) if text.startswith("->") else file.write_text(text)
        (folder / "root").mkdir(parents=True, exist_ok=True)
        raw = folder / "gateway.raw"
        raw.write_bytes(b"0" * 1000)
        raw.with_suffix(".efi").write_bytes(b"0" * 10)
        listed = [{"name": key, "version": value} for key, value in packages.items()]
        raw.with_suffix(".manifest").write_text(json.dumps({"packages": listed}))
        return raw

    monkeypatch.setattr(diff, "unpack", lambda raw: Root(raw.parent / "root"))
    return image


def found(old: Path, new: Path, *, list_all: bool = False) -> diff.Difference:
    return diff.compare(diff.read_image(old), diff.read_image(new), list_all=list_all)


def test_two_equal_images_differ_in_nothing(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (make(name, {"zstd": "1"}, {"etc/hosts": "a"}) for name in ("one", "two"))
    assert diff.main([str(one), str(two)]) == 0
    assert "packages: no difference" in capsys.readouterr().out


def test_packages_that_are_new_gone_or_of_another_version_are_told_apart(make: Make) -> None:
    one = make("one", {"bird2": "2.17", "gone": "1", "zstd": "1"}, {})
    two = make("two", {"bird2": "2.18", "gpg": "2.4", "zstd": "1"}, {})
    assert found(one, two).packages == ["- gone 1", "+ gpg 2.4", "~ bird2 2.17 -> 2.18"]


def test_a_unit_that_starts_at_boot_from_now_on_is_named(make: Make) -> None:
    unit = "etc/systemd/system/multi-user.target.wants/dsnatd.service"
    one = make("one", {}, {})
    two = make("two", {}, {unit: "->/usr/lib/systemd/system/dsnatd.service"})
    assert found(one, two).units == ["+ dsnatd.service"]
    assert found(two, one).units == ["- dsnatd.service"]


def test_a_file_that_became_executable_is_shown_with_both_modes(make: Make) -> None:
    one, two = (make(name, {}, {"usr/bin/x": "same"}) for name in ("one", "two"))
    (one.parent / "root/usr/bin/x").chmod(0o644)
    (two.parent / "root/usr/bin/x").chmod(0o755)
    assert found(one, two).files == ["~ usr/bin/x -rw-r--r-- -> -rwxr-xr-x"]


def test_other_content_is_counted_and_listed_where_it_is_ours_or_asked_for(make: Make) -> None:
    one = make("one", {}, {"etc/a": "1", "usr/lib/libc.so": "1"})
    two = make("two", {}, {"etc/a": "22", "usr/lib/libc.so": "22"})
    assert found(one, two).changed_files == 2
    assert found(one, two).files == ["~ etc/a 1 -> 2 bytes"]
    assert len(found(one, two, list_all=True).files) == 2


def test_a_link_that_leads_elsewhere_is_a_difference(make: Make) -> None:
    one = make("one", {}, {"etc/localtime": "->/usr/share/zoneinfo/UTC"})
    two = make("two", {}, {"etc/localtime": "->/usr/share/zoneinfo/CET"})
    assert found(one, two).changed_files == 1
    assert diff.main([str(one), str(two)]) == diff.EXIT_DIFFERENT


def test_an_image_that_is_not_there_is_said_with_what_to_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert diff.main([str(tmp_path / "a.raw"), str(tmp_path / "b.raw")]) == diff.EXIT_NEEDS
    assert "name a .raw file that `make image` made" in capsys.readouterr().err
