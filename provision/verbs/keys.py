"""The host keys of gateways."""

from __future__ import annotations

import click

from provision.verbs import SOME_FAILED, Exit, Options, chosen, emit, look_at, read, shared


@click.command()
@click.option("--known-hosts", is_flag=True, help="Print lines for OpenSSH's known_hosts.")
@click.option("--check", is_flag=True, help="Connect, and say whose key is another.")
@shared
def keys(options: Options, known_hosts: bool, check: bool) -> None:
    """The host keys that are pinned in the file, and whether the gateways show them."""
    from provision import show

    fleet = read(options)
    names = chosen(fleet, options)
    if known_hosts:
        for name in names:
            address, port = fleet.gateways[name].management.address, fleet.ssh_of(name).port
            place = address if port == 22 else f"[{address}]:{port}"
            print(f"{place} {' '.join(fleet.gateways[name].host_key.split()[:2])}")
        return
    answers = {name: "" for name in names}
    if check:
        _, running, missing = look_at(fleet, names, options)
        answers = {name: "as pinned" if name in running else missing[name].text for name in names}
    pinned = {name: _fingerprint(fleet.gateways[name].host_key) for name in names}
    if options.json:
        emit(
            {
                n: {"fingerprint": pinned[n], "check": answers[n]} if check else {"fingerprint": pinned[n]}
                for n in names
            }
        )
    else:
        rows = [
            (name, fleet.gateways[name].management.address, pinned[name], answers[name]) for name in names
        ]
        show.table(("GATEWAY", "ADDRESS", "HOST KEY", "CHECK" if check else ""), rows)
    if check and any(answer != "as pinned" for answer in answers.values()):
        raise Exit(SOME_FAILED)


def _fingerprint(key: str) -> str:
    import base64
    import hashlib

    digest = hashlib.sha256(base64.b64decode(key.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")
