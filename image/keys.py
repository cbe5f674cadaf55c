"""Keys that make an image trusted: `python -m image.keys make FOLDER`, and what the builder does with such a
folder.

    secure-boot.key, secure-boot.crt   sign systemd-boot and the UKI; the firmware must know the certificate
    updates.asc                        a secret OpenPGP key; signs SHA256SUMS, its public half is in the image

They are never in the repository and never in an image, besides the public halves. `make` makes throw-away
ones, for tests and for a first try; a real pair is made and kept where other release keys are. Whoever has
updates.asc can put any image on every gateway that runs one of ours.

Exit status: 0 made, 1 a tool failed, 2 wrong usage, 3 there are keys already.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

EXIT_THERE = 3


class KeysError(Exception):
    """One sentence: which key, what is wrong, what to do."""


def run(*argv: str, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        argv, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=os.environ | (env or {})
    )
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise KeysError(
            f"`{' '.join(argv[:3])} ...` failed: {said[-1] if said else f'status {done.returncode}'}"
        )
    return done.stdout


@contextmanager
def keyring(secret: Path | None = None) -> Iterator[dict[str, str]]:
    """The environment of a GnuPG that knows one key and forgets it afterwards."""
    # its agent's socket has a short name only in a short folder
    with tempfile.TemporaryDirectory(prefix="dsnat-gpg-", dir="/tmp") as home:
        env = {"GNUPGHOME": home}
        try:
            if secret is not None:
                run("gpg", "--batch", "--import", str(secret), env=env)
            yield env
        finally:
            subprocess.run(
                ["gpgconf", "--kill", "all"], env=os.environ | env, capture_output=True, check=False
            )


@dataclass(frozen=True)
class Keys:
    """A folder of keys. Either kind may be missing; what it would sign is then not signed."""

    folder: Path

    @property
    def secure_boot(self) -> tuple[Path, Path] | None:
        key, certificate = self.folder / "secure-boot.key", self.folder / "secure-boot.crt"
        if key.exists() != certificate.exists():
            raise KeysError(f"{self.folder}: secure-boot.key and secure-boot.crt belong together")
        return (key, certificate) if key.exists() else None

    @property
    def updates(self) -> Path | None:
        path = self.folder / "updates.asc"
        return path if path.exists() else None

    def check(self) -> None:
        if self.secure_boot is None and self.updates is None:
            raise KeysError(
                f"{self.folder} holds neither secure-boot.key and secure-boot.crt nor updates.asc; "
                "`python -m image.keys make FOLDER` makes throw-away ones"
            )

    def fingerprint(self) -> str:
        """What changes in an image with these keys: the public halves."""
        parts = [self.secure_boot[1].read_text()] if self.secure_boot else []
        if self.updates:
            with keyring(self.updates) as env:
                listed = run("gpg", "--batch", "--with-colons", "--fingerprint", env=env)
                parts += [line for line in listed.splitlines() if line.startswith("fpr:")]
        return "\n".join(parts)

    def public_tree(self, top: Path) -> None:
        """The public half of the update key, where the image will have it."""
        if self.updates:
            target = top / "usr/share/dsnat/updates.gpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            with keyring(self.updates) as env:
                run("gpg", "--batch", "--output", str(target), "--export", env=env)
            target.chmod(0o644)

    def sign(self, sums: Path) -> Path | None:
        """SHA256SUMS.gpg beside SHA256SUMS, as systemd-sysupdate wants it."""
        if self.updates is None:
            return None
        signature = sums.with_name(f"{sums.name}.gpg")
        signature.unlink(missing_ok=True)
        with keyring(self.updates) as env:
            run("gpg", "--batch", "--yes", "--output", str(signature), "--detach-sign", str(sums), env=env)
        return signature

    def mkosi_options(self) -> list[str]:
        """mkosi signs systemd-boot and the UKI; firmware in setup mode takes the certificate from the ESP."""
        if self.secure_boot is None:
            return []
        key, certificate = self.secure_boot
        return [
            "--secure-boot=yes",
            f"--secure-boot-key={key.resolve()}",
            f"--secure-boot-certificate={certificate.resolve()}",
        ]


def make_keys(folder: Path, name: str = "dsnat throw-away") -> Keys:
    keys = Keys(folder)
    if folder.exists() and any(folder.iterdir()):
        raise KeysError(f"{folder} is not empty; keys are never overwritten")
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    run(
        *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-noenc", "-sha256", "-days", "3650"),
        *("-subj", f"/CN={re.sub(r'[/=]', ' ', name)} Secure Boot"),
        *("-keyout", str(folder / "secure-boot.key"), "-out", str(folder / "secure-boot.crt")),
    )
    with keyring() as env:
        common = ("gpg", "--batch", "--pinentry-mode", "loopback", "--passphrase", "")
        run(*common, "--quick-generate-key", f"{name} updates", "rsa3072", "sign", "never", env=env)
        run(*common, "--armor", "--output", str(folder / "updates.asc"), "--export-secret-keys", env=env)
    for path in folder.iterdir():
        path.chmod(0o600)
    return keys


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m image.keys", description="Keys that sign an image.")
    parser.add_argument("verb", choices=["make"], help="make throw-away keys in FOLDER")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    options = parser.parse_args(arguments)
    try:
        make_keys(options.folder)
    except KeysError as error:
        print(f"keys: {error}", file=sys.stderr)
        return EXIT_THERE if "not empty" in str(error) else 1
    except OSError as error:
        print(f"keys: {options.folder}: {error.strerror}; name a folder that can be written", file=sys.stderr)
        return 1
    print(f"keys: {options.folder} signs an image with: python -m image.build --keys {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
