"""References to secrets -> secrets. A secret is never in fleet.yaml, in argv, in a plan or in a log.

env:NAME      from the environment
file:PATH     from a file (relative to fleet.yaml), its first line
age:PATH      from a file that `age` decrypts with the identity in DSNAT_AGE_IDENTITY
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path


class SecretError(Exception):
    """A reference that leads to nothing usable. One sentence, without the secret."""


def resolve(reference: str, directory: Path) -> str:
    kind, _, rest = reference.partition(":")
    if kind == "env":
        value = os.environ.get(rest)
        if value is None:
            raise SecretError(f"{reference}: {rest} is not set in the environment")
    elif kind == "file":
        try:
            value = (directory / Path(rest).expanduser()).read_text()
        except OSError as error:
            raise SecretError(f"{reference}: cannot be read ({error.strerror})") from None
        except UnicodeDecodeError:
            raise SecretError(f"{reference}: is not text") from None
    else:
        value = _age(directory / Path(rest).expanduser(), reference)
    first = value.splitlines()[0] if value else ""
    if not first:
        raise SecretError(f"{reference}: is empty")
    return first


def vrrp_password(reference: str, directory: Path) -> str:
    """keepalived cuts a longer one without a word, and both of a pair would still agree; a third would
    not.
    """
    value = resolve(reference, directory)
    if len(value) > 8 or not value.isalnum():
        raise SecretError(
            f"{reference}: a VRRP password has at most 8 letters and digits, the key of a pair 64 "
            "hexadecimal digits"
        )
    return value


def of_fleet(reference: str, directory: Path) -> str:
    """What a fleet refers to: the key of a pair (64 hexadecimal digits), or a VRRP password."""
    value = resolve(reference, directory)
    if re.fullmatch(r"[0-9a-fA-F]{64}", value):
        return value
    return vrrp_password(reference, directory)


def _age(path: Path, reference: str) -> str:
    identity = os.environ.get("DSNAT_AGE_IDENTITY")
    if identity is None:
        raise SecretError(f"{reference}: set DSNAT_AGE_IDENTITY to the file of your age identity")
    try:
        done = subprocess.run(
            ["age", "--decrypt", "--identity", identity, str(path)],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SecretError(f"{reference}: age could not be run: {error}") from None
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or ["age failed"]
        raise SecretError(f"{reference}: {said[-1]}")
    return done.stdout
