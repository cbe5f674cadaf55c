"""A new image for a gateway: its files over SSH into the idle slot, a restart, and the look whether it came
up.

SHA256SUMS and its signature go along: an image that was built with keys writes only what they signed. The
gateway writes the slot with `dsnat-image update` and counts its boots: an image that does not get well
is left by itself after three tries, for the one before it. So the result here is read, not assumed: the
update is good when its version runs and the gateway's own health check has taken it off trial. Pairs go as
in a push: the backup first; a master hands over before it restarts. A gateway alone is away for as long as
it takes to boot.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from provision.agent.image import UPDATE_FILES
from provision.plan import Running
from provision.push import FACTS_S, AgentRefused, Dial, Remote, Result
from provision.ssh import GatewayError, LostInFlight, Unreachable

CHUNK = 1 << 20
SEND_S = 1800.0
WRITE_S = 900.0
BOOT_S = 1500.0  # three tries of an image that fails, five minutes each, and the one before it
PAUSE_S = 2.0


class BadImage(Exception):
    """A folder that does not hold one whole image. One sentence."""


@dataclass(frozen=True)
class ImageFile:
    path: Path
    size: int
    sha256: str

    def chunks(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            while data := file.read(CHUNK):
                yield data


@dataclass(frozen=True)
class Image:
    version: str
    files: tuple[ImageFile, ...]


def find_image(directory: Path, version: str | None = None) -> Image:
    """The files of one version, compressed ones where there are both, checked against SHA256SUMS."""
    if not directory.is_dir():
        raise BadImage(f"{directory} is not a folder with an image; name the one that `make image` filled")
    found = sorted(m[1] for p in directory.iterdir() if (m := re.fullmatch(r"gateway_(.+)\.efi", p.name)))
    if version is None:
        if not found:
            raise BadImage(f"{directory} holds no image; name the folder that `make image` filled")
        if len(found) != 1:
            raise BadImage(f"{directory} holds {', '.join(found)}; say which with --version")
        version = found[0]
    paths = [
        p
        for p in directory.glob(f"gateway_{version}.*")
        if re.fullmatch(UPDATE_FILES, p.name) and p.is_file()
    ]
    paths = [p for p in paths if p.with_name(p.name + ".gz") not in paths]
    kinds = {re.sub(r".*\.(root-x86-64-verity|root-x86-64|efi)\b.*", r"\1", p.name) for p in paths}
    if kinds != {"root-x86-64-verity", "root-x86-64", "efi"}:
        raise BadImage(
            f"{directory} does not hold all parts of version {version} (root, verity and efi); build it again"
        )
    sums = _sums(directory)
    files = []
    for path in sorted(paths):
        sha256 = hashlib.sha256()
        for data in ImageFile(path, 0, "").chunks():
            sha256.update(data)
        if sums.get(path.name, sha256.hexdigest()) != sha256.hexdigest():
            raise BadImage(f"{path} is not what SHA256SUMS says; build or fetch it again")
        files.append(ImageFile(path, path.stat().st_size, sha256.hexdigest()))
    for path in (directory / "SHA256SUMS", directory / "SHA256SUMS.gpg"):
        if path.exists():
            files.append(ImageFile(path, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()))
    return Image(version, tuple(files))


def _sums(directory: Path) -> dict[str, str]:
    try:
        lines = (directory / "SHA256SUMS").read_text().splitlines()
    except OSError:
        return {}
    return {name.lstrip("*"): digest for digest, _, name in (line.partition("  ") for line in lines)}


def update_one(
    running: Running,
    image: Image,
    dial: Dial,
    owner: str,
    *,
    now: Callable[[], float] = time.monotonic,
    nap: Callable[[float], None] = time.sleep,
    say: Callable[[str, str], None] = lambda gateway, text: None,
) -> Result:
    """Sends, writes, restarts, and waits until the gateway is well with the new image or has gone back."""
    name, begun, before = running.gateway, now(), str(running.facts.get("image", ""))

    def result(outcome: str, text: str = "") -> Result:
        return Result(name, outcome, text, running.generation, round(now() - begun, 1))

    if before == image.version:
        return result("unchanged", f"runs {image.version} already")
    try:
        with dial(name) as remote:
            for file in image.files:
                say(name, f"sending {file.path.name} ({file.size >> 20} MiB)")
                head = {
                    "do": "receive",
                    "name": file.path.name,
                    "size": file.size,
                    "sha256": file.sha256,
                    "owner": owner,
                }
                remote.ask(head, deadline_s=SEND_S, stream=file.chunks())
            say(name, f"writing {image.version} to the idle slot")
            remote.ask({"do": "update", "version": image.version, "owner": owner}, deadline_s=WRITE_S)
            say(name, "restarting")
            _restart(remote, owner)
    except AgentRefused as refused:
        return result("locked" if refused.word == "locked" else "failed", str(refused))
    except Unreachable as error:
        return result("unreached", str(error))
    except GatewayError as error:
        return result("failed", str(error))
    return _await(running, image, dial, now, nap, result)


def _restart(remote: Remote, owner: str) -> None:
    with suppress(LostInFlight):  # it was quicker than its answer
        remote.ask({"do": "restart", "owner": owner}, deadline_s=FACTS_S)


def _await(
    running: Running,
    image: Image,
    dial: Dial,
    now: Callable[[], float],
    nap: Callable[[float], None],
    result: Callable[..., Result],
) -> Result:
    name, boot, end = running.gateway, running.facts.get("boot_id"), now() + BOOT_S
    doubt = "it did not restart"
    while now() < end:
        nap(PAUSE_S)
        try:
            with dial(name) as remote:
                found = Running(name, remote.ask({"do": "facts", "shows": []}, deadline_s=FACTS_S))
        except GatewayError as error:
            doubt = str(error)
            continue
        if found.facts.get("boot_id") == boot:
            continue
        runs = found.facts.get("image")
        if runs != image.version:
            return result(
                "reverted", f"the gateway went back to image {runs} by itself; its journal says why"
            )
        if found.facts.get("on_trial"):
            doubt = f"its health check has not found {runs} well yet; its journal says why (dsnat-healthy)"
            continue
        engine = found.facts.get("engine", {})
        if "dsnatd.yaml" not in found.files or "error" not in engine:
            return result("confirmed", f"runs {image.version}")
        doubt = f"the engine does not answer: {engine['error']}"
    return result("failed", f"not well {BOOT_S:.0f} s after the restart: {doubt}")
