"""Verbs that need no gateway: the file, what follows from it, and what it can be made of."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from provision.verbs import INVALID, Exit, Options, emit, no_gateway, read, shared, wanted_files

if TYPE_CHECKING:
    from provision.dsnat import Known
    from provision.load import Problem, Source
    from provision.model import Fleet


@click.command()
@shared
def validate(options: Options) -> None:
    """Check the file: form, names, and rules over the whole fleet."""
    from provision.load import InvalidFleet, load
    from provision.validate import validate as rules

    problems: list[Problem] = []
    fleet: Fleet | None = None
    source: Source
    try:
        fleet, source = load(options.file)
        problems = rules(fleet, source)
        if not any(problem.warning is False for problem in problems):
            wanted_files(fleet, list(fleet.gateways), options)
    except InvalidFleet as error:
        problems = error.problems
    bad = sum(not problem.warning for problem in problems)
    if options.json:
        emit({"ok": not bad, "problems": [problem.as_json() for problem in problems]})
    else:
        for problem in problems:
            print(problem, file=sys.stderr)
        if not bad and fleet is not None:
            pools = sum(pool.size() for pool in fleet.pools.values())
            print(
                f"{options.file}: valid; {len(fleet.gateways)} gateways, {len(fleet.pairs)} pairs, "
                f"{len(fleet.pools)} pools with {pools} addresses"
            )
    if bad:
        raise Exit(INVALID, "" if options.json else f"{options.file}: {bad} error{'s' * (bad > 1)}")


@click.command()
@click.argument("gateway")
@shared
def render(options: Options, gateway: str) -> None:
    """Print the files that GATEWAY should have. Needs no network."""
    fleet = read(options)
    if gateway not in fleet.gateways:
        raise no_gateway(options, fleet, gateway)
    from provision.plan import shown

    rendered = wanted_files(fleet, [gateway], options)[gateway]
    if options.json:
        emit({name: shown(file.text) for name, file in rendered.files.items()})
        return
    for name, file in rendered.files.items():
        print(f"==> {name}\n{shown(file.text)}")


@click.command()
@click.option("--lost", multiple=True, metavar="MEMBER", help="Gone for good: its addresses are free.")
@shared
def slices(options: Options, lost: tuple[str, ...]) -> None:
    """Who owns which addresses in a cluster. A push writes it down; this only when a member is lost."""
    from provision import show
    from provision import slices as arithmetic
    from provision.cluster import keep_slices
    from provision.load import load, replace_text, slices_file

    kept = slices_file(options.file)
    if lost:
        fleet, _ = load(options.file)
        known = {member for pools in fleet.slices.values() for owners in pools.values() for member in owners}
        for member in lost:
            if member not in known:
                raise Exit(INVALID, f"--lost {member}: {kept} gives it nothing")
            if any(fleet.weights_of(name).get(member) for name in fleet.clusters):
                text = f"{member} is still in {options.file}; take it out, or give it weight: 0"
                raise Exit(INVALID, text)
        lines = kept.read_text().splitlines(keepends=True)
        left = "".join(line for line in lines if line.strip().partition(":")[0] not in lost)
        replace_text(kept, left)
    fleet = read(options)
    if lost:
        keep_slices(kept, fleet)
    if options.json:
        emit(
            {
                cluster: {
                    pool: {m: arithmetic.text(r) for m, r in owned.items()}
                    for (of, pool), owned in fleet.division.items()
                    if of == cluster
                }
                for cluster in fleet.clusters
            }
        )
        return
    if not fleet.clusters:
        print(f"{options.file} has no cluster; pools are cut only for those")
        return
    rows = [
        (cluster, pool, member, str(arithmetic.size(r)), ", ".join(arithmetic.prefixes(r)))
        for (cluster, pool), owned in fleet.division.items()
        for member, r in owned.items()
    ]
    show.table(("CLUSTER", "POOL", "MEMBER", "ADDRESSES", "PREFIXES"), rows)


@click.command("import")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--management", multiple=True, metavar="[GW=]ADDRESS", help="Management address of a gateway.")
@click.option("--host-key", multiple=True, metavar="[GW=]KEY", help="Its SSH host key.")
@click.option(
    "--interface",
    multiple=True,
    metavar="[GW:]NAME=ADDRESS/LEN[,PCI]",
    help="An interface's own address and device.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs: the text and the remarks.")
def import_(
    files: tuple[Path, ...],
    management: tuple[str, ...],
    host_key: tuple[str, ...],
    interface: tuple[str, ...],
    as_json: bool,
) -> None:
    """Print fleet.yaml for dsnat's own files: keepalived.conf (both nodes'), rc.local, ipvsadm -S.

    What could not be carried over is named on standard error. Gateways are called gw1, gw2 in the
    order of files.
    """
    from provision.dsnat import NotDsnat, import_files

    texts: list[tuple[str, str]] = []
    for file in files:
        try:
            texts.append((str(file), file.read_text(errors="replace")))
        except OSError as error:
            raise Exit(
                INVALID, f"{file} cannot be read ({error.strerror}); name dsnat's own files"
            ) from error
        if "\0" in texts[-1][1]:
            raise Exit(INVALID, f"{file} is not a text file; name keepalived.conf, rc.local or ipvsadm -S")
    known = _known(management, host_key, interface)
    try:
        imported = import_files(texts, known)
    except NotDsnat as error:
        raise Exit(INVALID, str(error)) from error
    for name in sorted(known.keys() - set(imported.gateways)):
        raise Exit(INVALID, f"the options speak of {name}; the files describe {', '.join(imported.gateways)}")
    if as_json:
        emit({"fleet": imported.text, "remarks": imported.remarks})
        return
    for remark in imported.remarks:
        print("".join(c if c.isprintable() else "?" for c in remark), file=sys.stderr)
    print(imported.text, end="")


def _known(management: Sequence[str], host_key: Sequence[str], interface: Sequence[str]) -> dict[str, Known]:
    """What the options say about each gateway; without a name they mean gw1."""
    from provision.dsnat import CHANGE, Known

    def by_gateway(given: Sequence[str], mark: str) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for text in given:
            name, rest = text.split(mark, 1) if re.match(rf"gw\d+{mark}", text) else ("gw1", text)
            found.setdefault(name, []).append(rest)
        return found

    addresses, names = by_gateway(interface, ":"), by_gateway(management, "=")
    keys = by_gateway(host_key, "=")
    known: dict[str, Known] = {}
    for gateway in addresses.keys() | names.keys() | keys.keys():
        own: list[tuple[str, str]] = []
        devices: list[tuple[str, str]] = []
        for text in addresses.get(gateway, []):
            name, sign, rest = text.partition("=")
            address, _, device = rest.partition(",")
            if not sign or "/" not in address:
                raise Exit(
                    INVALID,
                    f"--interface {text}: write it as eth0=100.64.0.2/24 or eth0=100.64.0.2/24,0000:00:03.0",
                )
            own.append((name, address))
            if device:
                devices.append((name, device))
        known[gateway] = Known(
            names.get(gateway, [CHANGE])[-1], keys.get(gateway, [CHANGE])[-1], tuple(own), tuple(devices)
        )
    return known


@click.command()
@click.option("--json", "as_json", is_flag=True, help="As it is without: the schema is JSON.")
def schema(as_json: bool) -> None:
    """Print the JSON schema of fleet.yaml, for editors."""
    from provision.model import Fleet

    emit({"$schema": "https://json-schema.org/draft/2020-12/schema", **Fleet.model_json_schema()})
