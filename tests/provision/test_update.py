"""A new image: sent whole, written, booted, and believed only when the gateway itself runs it."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import pytest

from provision.agent import Refused
from provision.plan import Running
from provision.push import Result, gather
from provision.update import BadImage, find_image, update_one
from tests.provision.machine import Client, FakeMachine
from tests.provision.test_push import Lab

UUID = "0123456789abcdef" * 2
PARTS = {
    "gateway_0.2.0.efi": b"kernel",
    f"gateway_0.2.0.root-x86-64.{UUID}.raw.gz": b"root" * 1000,
    f"gateway_0.2.0.root-x86-64-verity.{UUID}.raw": b"hashes",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "image"
    folder.mkdir()
    for name, data in PARTS.items():
        (folder / name).write_bytes(data)
    (folder / f"gateway_0.2.0.root-x86-64.{UUID}.raw").write_bytes(b"not compressed")
    (folder / "gateway_0.2.0.vmlinuz").write_bytes(b"not for updates")
    lines = [f"{hashlib.sha256(data).hexdigest()}  {name}" for name, data in PARTS.items()]
    (folder / "SHA256SUMS").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path, ["gw1", "gw2"])


def update(lab: Lab, folder: Path) -> Result:
    found = gather(["gw1"], lab.dial, jobs=1)["gw1"]
    assert isinstance(found, Running)
    return update_one(found, find_image(folder), lab.dial, "alice", now=lab.now, nap=lab.nap)


def test_the_parts_of_one_version_are_found_compressed_ones_first(folder: Path) -> None:
    image = find_image(folder)
    assert image.version == "0.2.0"
    assert {file.path.name for file in image.files} == {*PARTS, "SHA256SUMS"}


def test_a_signature_goes_along_for_gateways_that_want_one(lab: Lab, folder: Path) -> None:
    (folder / "SHA256SUMS.gpg").write_bytes(b"signed")
    assert "SHA256SUMS.gpg" in {file.path.name for file in find_image(folder).files}
    assert update(lab, folder).outcome == "confirmed"
    assert list(lab.machines["gw1"].updates.iterdir()) == []


def test_a_part_that_is_not_what_its_sum_says_is_not_sent(folder: Path) -> None:
    (folder / "gateway_0.2.0.efi").write_bytes(b"kernem")
    with pytest.raises(BadImage, match="is not what SHA256SUMS says"):
        find_image(folder)


def test_a_folder_without_a_whole_image_is_said_so(folder: Path, tmp_path: Path) -> None:
    (folder / f"gateway_0.2.0.root-x86-64-verity.{UUID}.raw").unlink()
    with pytest.raises(BadImage, match="does not hold all parts of version"):
        find_image(folder)
    with pytest.raises(BadImage, match="is not a folder"):
        find_image(tmp_path / "none")
    with pytest.raises(BadImage, match="holds no image"):
        find_image(tmp_path)


def test_an_update_ends_with_the_new_image_running(lab: Lab, folder: Path) -> None:
    result = update(lab, folder)
    assert (result.outcome, result.text) == ("confirmed", "runs 0.2.0")
    assert list(lab.machines["gw1"].updates.iterdir()) == []
    assert update(lab, folder).outcome == "unchanged"


def test_an_update_is_confirmed_only_when_the_gateway_has_found_itself_well(lab: Lab, folder: Path) -> None:
    lab.machines["gw1"].trial_s = 90.0
    result = update(lab, folder)
    assert result.outcome == "confirmed"
    assert not lab.machines["gw1"].on_trial()
    assert lab.machines["gw1"].now > 100.0


def test_an_update_that_stays_on_trial_is_a_failure(lab: Lab, folder: Path) -> None:
    lab.machines["gw1"].trial_s = 1e9
    result = update(lab, folder)
    assert result.outcome == "failed"
    assert "has not found 0.2.0 well yet" in result.text


def test_an_image_that_does_not_get_well_is_reported_as_left(lab: Lab, folder: Path) -> None:
    lab.machines["gw1"].bad_images.add("0.2.0")
    result = update(lab, folder)
    assert result.outcome == "reverted"
    assert "went back to image 0.1.0" in result.text


def test_a_gateway_that_does_not_come_back_is_a_failure(lab: Lab, folder: Path) -> None:
    def fault(name: str, verb: str) -> None:
        from provision.ssh import Unreachable

        if verb == "dial" and lab.machines["gw1"].boot:
            raise Unreachable("no route")

    lab.fault = fault
    result = update(lab, folder)
    assert result.outcome == "failed"
    assert "not well 1500 s after the restart: no route" in result.text


def test_a_part_that_did_not_arrive_whole_leaves_nothing(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path / "dsnat")
    machine.payload = io.BytesIO(b"ker")
    request = {
        "do": "receive",
        "name": "gateway_0.2.0.efi",
        "size": 6,
        "sha256": hashlib.sha256(b"kernel").hexdigest(),
    }
    with pytest.raises(Refused, match="did not arrive whole"):
        Client(machine, "alice").ask(**request)
    assert list(machine.updates.iterdir()) == []


@pytest.mark.parametrize("name", ["../x.efi", "gateway_1/../../x.efi", "passwd", "gateway_1.vmlinuz"])
def test_a_name_that_is_no_part_of_an_image_is_refused(tmp_path: Path, name: str) -> None:
    machine = FakeMachine(tmp_path / "dsnat")
    with pytest.raises(Refused, match="is not a part of an image"):
        Client(machine, "alice").ask(do="receive", name=name, size=1, sha256="")


def test_a_machine_with_a_pending_change_is_not_restarted(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path / "dsnat")
    alice = Client(machine, "alice")
    alice.apply(alice.stage("a"))
    with pytest.raises(Refused, match="waits to be confirmed"):
        alice.ask(do="restart")
    assert machine.boot == 0
