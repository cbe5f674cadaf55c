"""The machine's own package sources, moved to the image's release."""

from __future__ import annotations

from pathlib import Path

import pytest

from image.aptsources import Source, SourcesError, debian_sources

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


def apt(folder: Path, **files: str) -> Path:
    (folder / "sources.list.d").mkdir()
    for name, text in files.items():
        (folder / "sources.list.d" / name.replace("_", ".")).write_text(text)
    return folder


def test_suites_become_those_of_the_release_and_the_places_stay(tmp_path: Path) -> None:
    text = (
        "Types: deb\n# a remark\nURIs: http://mirror.example/debian\nSuites: bookworm bookworm-updates\n"
        f"Components: main\nSigned-By: {KEYRING}\n\n"
        "Types: deb\nURIs: http://other.example/debian-security\n"
        "Suites: bookworm-security\nComponents: main\n"
    )
    assert debian_sources("trixie", apt(tmp_path, debian_sources=text)) == [
        Source("http://mirror.example/debian", ("trixie", "trixie-updates")),
        Source("http://other.example/debian-security", ("trixie-security",)),
    ]


def test_the_old_one_line_style_is_read_as_well(tmp_path: Path) -> None:
    folder = apt(
        tmp_path,
        debian_list=f"deb [arch=amd64 signed-by={KEYRING}] "
        "http://mirror.example/pub trixie main contrib # the archive\n"
        "deb-src http://mirror.example/debian trixie main\n",
    )
    assert debian_sources("trixie", folder) == [Source("http://mirror.example/pub", ("trixie",))]


def test_third_parties_and_backports_are_left_out(tmp_path: Path) -> None:
    folder = apt(
        tmp_path,
        debian_list="deb http://mirror.example/debian bookworm main\n"
        "deb http://mirror.example/debian bookworm-backports main\n"
        "deb [signed-by=/etc/apt/keyrings/vendor.gpg] http://vendor.example/debian bookworm main\n"
        "deb http://vendor.example/apt bookworm stable\n",
    )
    assert debian_sources("trixie", folder) == [Source("http://mirror.example/debian", ("trixie",))]


def test_a_mirror_that_is_named_in_a_file_is_looked_up(tmp_path: Path) -> None:
    (tmp_path / "mirrors").write_text("https://mirror.example/debian\n")
    folder = apt(
        tmp_path,
        debian_sources=f"Types: deb\nURIs: mirror+file:{tmp_path}/mirrors\nSuites: bookworm\n"
        f"Components: main\nSigned-By: {KEYRING}\n",
    )
    assert debian_sources("trixie", folder) == [Source("https://mirror.example/debian", ("trixie",))]


def test_a_disabled_entry_does_not_count_and_none_at_all_is_an_error_that_says_what_to_do(
    tmp_path: Path,
) -> None:
    folder = apt(
        tmp_path,
        debian_sources="Enabled: no\nTypes: deb\nURIs: http://mirror.example/debian\n"
        "Suites: trixie\nComponents: main\n",
    )
    with pytest.raises(SourcesError, match=r"no entry of the Debian archive.*add one to sources\.list\.d"):
        debian_sources("trixie", folder)


def test_what_mkosi_gets_names_the_archive_key() -> None:
    source = Source("http://mirror.example/debian", ("trixie", "trixie-updates"))
    assert "Suites: trixie trixie-updates\n" in source.stanza()
    assert f"Signed-By: {KEYRING}\n" in source.stanza()
    assert source.one_line()[1].endswith("http://mirror.example/debian trixie-updates main")
