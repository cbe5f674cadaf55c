"""slots.sh (`dsnat-image`) and generation on a made-up gateway: what they do, refuse and leave alone.

That a real one updates, falls back and goes back is test_update.py's.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from image.keys import Keys, make_keys

ROOT = Path(__file__).resolve().parents[2]
SLOTS = ROOT / "image/slots.sh"
EXTRA = ROOT / "image/mkosi.extra"
UUID = "0123456789abcdef" * 2


class Box:
    """A root folder that runs 0.1.0, and stand-ins for the programs that are called."""

    def __init__(self, top: Path) -> None:
        self.top, self.called = top, top / "called"
        self.boot, self.updates = top / "efi/EFI/Linux", top / "var/updates"
        for folder in (self.boot, self.updates, top / "bin", top / "sys/firmware/efi/efivars"):
            folder.mkdir(parents=True)
        (top / "usr/lib").mkdir(parents=True)
        (top / "usr/lib/os-release").write_text("IMAGE_VERSION=0.1.0\n")
        definitions = top / "usr/lib/sysupdate.d"
        definitions.mkdir()
        for transfer in (EXTRA / "usr/lib/sysupdate.d").glob("*.transfer"):
            (definitions / transfer.name).write_text(transfer.read_text())
        (self.boot / "gateway_0.1.0.efi").write_bytes(b"uki" * 1000)
        self.called.write_text("")
        self.program("bootctl", f"echo {top}/efi")
        self.program("systemd-bless-boot", "echo clean")
        self.program("systemctl", "")
        self.program("df", "echo header; echo /dev/vda1 500000 1000 400000 1% /efi")
        # what the real one does with a boot entry
        entries = f'find {self.boot} -name "gateway_*" ! -name gateway_0.1.0.efi'
        written = f": > {self.boot}/gateway_0.1.1+3-0.efi; cp -r ${{1#--definitions=}} {top}/used"
        self.program(
            "systemd-sysupdate", f'case "$*" in\n*vacuum) {entries} -delete ;;\n*update*) {written} ;;\nesac'
        )

    def program(self, name: str, script: str) -> None:
        path = self.top / "bin" / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >> {self.called}\n{script}\n')
        path.chmod(0o755)

    def bring(self, folder: Path, version: str = "0.1.1") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        parts = [f"{version}.efi", f"{version}.root-x86-64.{UUID}.raw.gz"]
        lines = []
        for name in (f"gateway_{part}" for part in parts):
            (folder / name).write_text(name)
            lines.append(f"{hashlib.sha256(name.encode()).hexdigest()}  {name}\n")
        (folder / "SHA256SUMS").write_text("".join(lines))

    def trust(self, keys: Keys) -> None:
        ring = self.top / "usr/lib/systemd/import-pubring.gpg"
        ring.parent.mkdir()
        keys.public_tree(self.top)
        (self.top / "usr/share/dsnat/updates.gpg").rename(ring)

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        env = {"PATH": f"{self.top}/bin:{os.environ['PATH']}", "DSNAT_ROOT": str(self.top)}
        return subprocess.run(["sh", str(SLOTS), *words], env=env, capture_output=True, text=True, timeout=30)

    def entries(self) -> list[str]:
        return sorted(path.name for path in self.boot.iterdir())


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys") / "made")


def test_an_update_empties_the_idle_slot_first_and_leaves_the_running_one(box: Box) -> None:
    box.bring(box.updates)
    (box.boot / "gateway_0.0.9.efi").touch()
    done = box.run("update")
    assert done.returncode == 0, done.stderr
    assert "0.1.1 has 3 tries from the next start on; 0.1.0 stays beside it" in done.stdout
    calls = [line for line in box.called.read_text().splitlines() if line.startswith("systemd-sysupdate")]
    assert [call.split()[-1] for call in calls] == ["vacuum", "0.1.1"]
    assert box.entries() == ["gateway_0.1.0.efi", "gateway_0.1.1+3-0.efi"]


def test_a_part_that_is_not_what_its_sum_says_is_not_written(box: Box) -> None:
    box.bring(box.updates)
    (box.updates / "gateway_0.1.1.efi").write_text("other")
    done = box.run("update")
    assert done.returncode == 3
    assert "is not what SHA256SUMS says" in done.stderr
    assert "sysupdate" not in box.called.read_text()


def test_an_image_with_keys_takes_what_they_signed(box: Box, keys: Keys) -> None:
    box.trust(keys)
    box.bring(box.updates)
    keys.sign(box.updates / "SHA256SUMS")
    assert box.run("update").returncode == 0


@pytest.mark.parametrize("fault", ["no signature", "another key", "changed after signing", "part not listed"])
def test_an_image_with_keys_takes_nothing_else(
    box: Box, keys: Keys, tmp_path_factory: pytest.TempPathFactory, fault: str
) -> None:
    box.trust(keys)
    box.bring(box.updates)
    sums = box.updates / "SHA256SUMS"
    match fault:
        case "another key":
            make_keys(tmp_path_factory.mktemp("other") / "keys", "somebody else").sign(sums)
        case "changed after signing":
            keys.sign(sums)
            sums.write_text(sums.read_text() + "\n")
        case "part not listed":
            keys.sign(sums)
            (box.updates / f"gateway_0.1.1.root-x86-64-verity.{UUID}.raw").write_text("smuggled")
    done = box.run("update")
    assert done.returncode == 3
    assert "nothing was written" in done.stderr
    assert "sysupdate" not in box.called.read_text()


def test_from_a_server_only_signed_updates_are_taken(box: Box, keys: Keys) -> None:
    done = box.run("update", "--from", "http://192.0.2.1/images")
    assert done.returncode == 3
    assert "built without keys and takes nothing from a server" in done.stderr
    box.trust(keys)
    assert box.run("update", "--from", "http://192.0.2.1/images").returncode == 0
    for transfer in (box.top / "used").glob("*.transfer"):
        source, _, target = transfer.read_text().partition("[Target]")
        assert "Type=url-file\nPath=http://192.0.2.1/images\n" in source
        assert "Verify=no" not in source
        assert "http://" not in target


def test_a_version_on_trial_is_not_replaced(box: Box) -> None:
    box.program("systemd-bless-boot", "echo indeterminate")
    box.bring(box.updates)
    done = box.run("update")
    assert done.returncode == 3
    assert "0.1.0 is on trial itself" in done.stderr


def test_a_full_boot_partition_is_said_before_a_slot_is_written(box: Box) -> None:
    box.program("df", "echo header; echo /dev/vda1 500000 1000 2 1% /efi")
    box.bring(box.updates)
    done = box.run("update")
    assert done.returncode == 1
    assert "the boot partition has 0 MiB free and an update needs" in done.stderr
    assert "sysupdate --definitions" not in box.called.read_text().replace("vacuum", "").split("update ")[-1]


def test_an_update_that_could_not_be_written_leaves_no_entry(box: Box) -> None:
    box.bring(box.updates)
    box.program("systemd-sysupdate", 'case "$*" in *vacuum) exit 0 ;; esac; exit 1')
    done = box.run("update")
    assert done.returncode == 1
    assert "the update was not written; 0.1.0 stays" in done.stderr
    assert box.called.read_text().strip().endswith("vacuum")


def test_going_back_takes_the_tries_of_the_running_version_away(box: Box) -> None:
    (box.boot / "gateway_0.0.9.efi").touch()
    done = box.run("rollback")
    assert done.returncode == 0, done.stderr
    assert box.entries() == ["gateway_0.0.9.efi", "gateway_0.1.0+0-3.efi"]
    assert "systemctl reboot" in box.called.read_text()


@pytest.mark.parametrize(
    ("other", "said"),
    [(None, "there is no other image"), ("gateway_0.1.1+0-3.efi", "0.1.1, failed its three tries")],
)
def test_there_is_no_way_back_to_what_is_not_there_or_failed(box: Box, other: str | None, said: str) -> None:
    if other:
        (box.boot / other).touch()
    done = box.run("rollback")
    assert done.returncode == 3
    assert said in done.stderr
    assert "gateway_0.1.0.efi" in box.entries()
    assert "reboot" not in box.called.read_text()


def test_status_tells_what_each_slot_is_worth(box: Box) -> None:
    (box.boot / "gateway_0.1.1+2-1.efi").touch()
    shown = box.run("status").stdout
    assert "0.1.0                runs, good" in shown
    assert "0.1.1                on trial, 2 tries left" in shown
    assert "updates are not signed" in shown


def test_a_factory_reset_wants_to_be_meant(box: Box) -> None:
    assert box.run("factory-reset").returncode == 3
    assert "reboot" not in box.called.read_text()
    assert box.run("factory-reset", "--yes").returncode == 0
    (wish,) = (box.top / "sys/firmware/efi/efivars").iterdir()
    # the initrd waits for this very name
    unit = "image/mkosi.images/initrd/mkosi.extra/usr/lib/systemd/system/dsnat-factory-reset.service"
    assert f"/efivars/{wish.name}\n" in (ROOT / unit).read_text()
    assert "systemctl reboot" in box.called.read_text()


@pytest.mark.parametrize("words", [[], ["dance"], ["update", "1", "2"], ["update", "--from"]])
def test_wrong_words_are_a_usage_error(box: Box, words: list[str]) -> None:
    assert box.run(*words).returncode == 2


# ---- generation: after a fall back


class Store:
    """Generations of which some are understood: those without the word NEW."""

    def __init__(self, top: Path) -> None:
        self.top = top
        for folder in ("generations/0", "bin"):
            (top / folder).mkdir(parents=True)
        for number, text in ((1, "old"), (2, "old"), (3, "NEW")):
            (top / f"generations/{number}").mkdir()
            (top / f"generations/{number}/dsnatd.yaml").write_text(text)
        (top / "generations/current").symlink_to("3")
        program = top / "bin/dsnatd"
        program.write_text('#!/bin/sh\n! grep -q NEW "$2"\n')
        program.chmod(0o755)

    def boot(self, last_well: str) -> str:
        (self.top / "well").write_text(f"{last_well}\n")
        env = {"PATH": f"{self.top}/bin:{os.environ['PATH']}", "DSNAT_STORE": str(self.top)}
        script = (EXTRA / "usr/lib/dsnat/generation").read_text()
        release = self.top / "os-release"
        release.write_text("IMAGE_VERSION=0.1.0\n")
        script = script.replace("/usr/lib/os-release", str(release))
        done = subprocess.run(
            ["sh", "-c", script], env=env, capture_output=True, text=True, timeout=30, check=False
        )
        return done.stderr

    @property
    def live(self) -> str:
        return str((self.top / "generations/current").readlink())


def test_an_older_image_takes_the_newest_configuration_that_it_understands(tmp_path: Path) -> None:
    store = Store(tmp_path)
    said = store.boot(last_well="0.2.0")
    assert store.live == "2"
    assert "image 0.1.0 does not understand configuration 3; 2 is live now" in said


def test_a_file_that_the_operator_broke_is_left_for_him_to_see(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.boot(last_well="0.1.0") == ""
    assert store.live == "3"


def test_generation_zero_is_never_fallen_back_to_because_it_lets_packets_out(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for number in (1, 2):
        (tmp_path / f"generations/{number}/dsnatd.yaml").write_text("NEW")
    assert "understands no configuration here" in store.boot(last_well="0.2.0")
    assert store.live == "3"
