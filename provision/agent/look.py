"""Requests that only read: they write nothing, whatever waits to be confirmed."""

from __future__ import annotations

import contextlib
import json
import os
import re
from typing import Any

from .disk import digest, digest_of_files
from .protocol import VERSION, Json, Refused, files_below, number_in, without_secrets
from .routing import routing_facts
from .services import BGP
from .state import State

# No word is a path, and every option is on a list: these commands run as root, for people who may not read
# every file, or talk to another socket, network namespace or machine by a short or shortened option.
WORD = r"[A-Za-z0-9][A-Za-z0-9_.:@,-]*(/[0-9]{1,3})?"
ASKED = "host|remote|outside|protocol|state|pool|older-s|younger-s|limit|seconds|flags|size|ttl"
READING = (
    rf"dsnatctl (show|who|explain|rfc)( {WORD}| --json| --dont-fragment| --({ASKED})[ =]{WORD})*",
    rf"ip( -(j|json|s|d|o|br|brief|4|6))* (address|addr|route|rule|neigh|neighbour|link)( show( {WORD})*)?",
    rf"birdc -r show (protocols|route|status|bfd sessions)( {WORD})*",
    r"systemctl (status|is-active|is-failed|show|list-units|list-timers)"
    rf"( {WORD}| -[al]| -p [A-Za-z,]+| -n [0-9]+| --(all|failed|full|no-pager|value)"
    r"| --(property|state|type)=[A-Za-z,-]+)*",
    rf"networkctl (list|status)( {WORD}| -[as]| --(all|stats|no-pager))*",
    r"journalctl( (-b|-k|--no-pager|-n [0-9]+|-u [A-Za-z0-9_.@-]+))*",
    r"(dsnatd|keepalived) --version",
    r"uptime|uname -a|df|free|nproc",
)


def status(state: State, request: Json) -> Json:
    machine, pending, lease = state.machine, state.pending(), state.lease()
    found: Json = {
        "generation": state.current(),
        "state": "idle" if pending is None else pending.get("state", "unreadable"),
        "boot_id": machine.boot_id(),
        "digest": digest_of_files(state.manifest(state.current()).get("files", {})),
    }
    if pending is not None:
        left = pending.get("deadline", 0) - machine.clock()
        found["pending"] = {k: pending.get(k) for k in ("generation", "base", "owner", "plan")}
        found["pending"]["deadline_in_s"] = (
            round(left, 1) if pending.get("boot_id") == found["boot_id"] else 0
        )
    if lease is not None:
        found["lease"] = {
            "owner": lease["owner"],
            "ends_in_s": round(lease["until"] - machine.clock(), 1),
        }
    last = next((e for e in reversed(state.history()) if e.get("event") in ("confirmed", "reverted")), None)
    found["last"] = last
    return found


def facts(state: State, request: Json) -> Json:
    """All that a plan, a status page and a health gate need, in one round trip."""
    machine = state.machine
    found = status(state, request)
    manifest = state.manifest(found["generation"])
    here = state.generations / str(found["generation"])
    files: Json = {}
    for name in sorted(manifest.get("files", {}).keys() | files_below(here)):
        try:
            data = (here / name).read_bytes()
        except OSError:
            continue
        files[name] = {"sha256": digest(data), "text": without_secrets(data.decode(errors="replace"))}
    said = manifest.get("files", {})
    drift = sorted(n for n in said.keys() | files.keys() if said.get(n) != files.get(n, {}).get("sha256"))
    units = ("dsnatd", "dsnat-nic", "dsnat-failclosed", "keepalived", "bird", "systemd-networkd")
    _, active = machine.run(["systemctl", "is-active", *(f"{u}.service" for u in units)], 10.0)
    found.update(
        agent=VERSION,
        host=os.uname().nodename,
        wall=machine.wall(),
        uptime_s=round(machine.clock(), 1),
        image=machine.image_version(),
        on_trial=machine.on_trial(),
        manifest={k: v for k, v in manifest.items() if k != "files"},
        files=files,
        drift=drift,
        units=dict(zip(units, active.split(), strict=False)),
        addresses=addresses(state),
        drained=machine.is_drained(),
        routing=routing_facts(state) if BGP in said else {},
        engine=engine_facts(state, request.get("shows", ["pools", "sync"])),
    )
    return found


def engine_facts(state: State, shows: Any) -> Json:
    """Never fails: `error` says why the engine does not answer; what it cannot show says so itself."""
    found: Json = {}
    try:
        found["status"] = state.machine.engine({"cmd": "status"})
    except (OSError, ValueError) as error:
        return {"error": str(error)}
    for what in shows if isinstance(shows, list) else []:
        try:
            found[str(what)] = state.machine.engine({"cmd": "show", "what": str(what)})
        except (OSError, ValueError) as error:
            found[str(what)] = {"error": str(error)}
    return found


def addresses(state: State) -> Json:
    status, text = state.machine.run(["ip", "-j", "address", "show"], 10.0)
    found: Json = {}
    if status == 0:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            for link in json.loads(text):
                found[link["ifname"]] = [a["local"] for a in link.get("addr_info", []) if "local" in a]
    return found


def history(state: State, last: int) -> Json:
    """What happened, and whether a line was changed or is missing."""
    return {"events": state.history()[-last:], "broken_at": state.broken_at()}


def probe(state: State, request: Json) -> Json:
    """Which of these addresses answer a ping: out by the engine's ports and back in, as hosts'
    packets go.
    """
    found: Json = {}
    for text in request.get("addresses", []):
        if not isinstance(text, str) or not re.fullmatch(r"[0-9.]{7,15}", text):
            raise Refused("usage", f"{text!r} is not an address to ping")
        found[text] = state.machine.pings(text)
    return {"answers": found}


def adverts(state: State, request: Json) -> Json:
    """For which of these VRRP ids another machine says that it is master."""
    ids = request.get("ids")
    if not isinstance(ids, list) or not all(isinstance(i, int) and 1 <= i <= 255 for i in ids):
        raise Refused("usage", '"ids" must be a list of VRRP ids')
    heard = state.machine.adverts(set(ids), number_in(request, "wait_s", 4, 1, 25))
    ours = {address for there in addresses(state).values() for address in there}
    return {"heard": {str(i): source for i, source in heard.items() if source not in ours}}


def execute(state: State, request: Json) -> Json:
    """A command that only reads, from a list; nothing of it goes through a shell."""
    argv = request.get("argv")
    if not isinstance(argv, list) or not all(isinstance(word, str) for word in argv) or not argv:
        raise Refused("usage", "the request holds no command")
    one_word_each = all(re.fullmatch(r"\S+", word) for word in argv)
    if not one_word_each or not any(re.fullmatch(pattern, " ".join(argv)) for pattern in READING):
        raise Refused("usage", f"{' '.join(argv)} is not one of the commands that only read")
    status, output = state.machine.run(argv, 20.0)
    return {"status": status, "output": output}
