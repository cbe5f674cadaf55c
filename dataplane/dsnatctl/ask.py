"""Verbs that only ask: nothing changes in the engine, whatever their answer.

show, status, rfc, version     one request, one table
show sessions, who             page by page, so that millions cost neither memory here nor time there
explain, plan                  with a packet or a file of the caller's own, tried and taken back
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator

from dsnatctl import show, sync
from dsnatctl.answer import FAILED, UsageError, filters, tell, text_of, wrong_file
from dsnatctl.client import Engine, Json, Refused

VIEWS: dict[str, Callable[[Json], Iterator[str]]] = {
    "pools": show.pools,
    "destinations": show.destinations,
    "zones": show.zones,
    "counters": show.counters,
    "workers": show.workers,
    "ports": show.ports,
    "config": show.config,
    "sync": sync.sync,
}


def do_show(arguments: argparse.Namespace) -> int:
    if arguments.what == "sessions":
        return show_sessions(arguments)
    request: Json = {"cmd": "show", "what": arguments.what}
    if arguments.what == "counters":
        request["explain"] = True
    if arguments.what == "pools":
        request |= {key: getattr(arguments, key) for key in ("pool", "limit") if getattr(arguments, key)}
    if arguments.what == "destinations" and arguments.limit:
        request["limit"] = arguments.limit
    with Engine(arguments.socket) as engine:
        answer = {} if arguments.what == "destinations" else engine.ask(**request)
        if arguments.what == "pools":
            request = {"cmd": "show", "what": "destinations"}
        if arguments.what in ("pools", "destinations"):
            scarce = engine.ask(**request)
            if arguments.seconds > 0:  # a time until full needs a rate, and the engine keeps no history
                time.sleep(arguments.seconds)
                scarce = show.with_time_to_full(scarce, engine.ask(**request), arguments.seconds)
            answer |= scarce
    tell(answer, VIEWS[arguments.what], as_json=arguments.json)
    return 0


def show_sessions(arguments: argparse.Namespace) -> int:
    """Page by page, so that millions cost neither memory here nor time there."""
    left = arguments.limit or sys.maxsize
    request = filters(arguments)
    begun, first = False, True
    with Engine(arguments.socket) as engine:
        for answer in engine.pages(cmd="show", what="sessions", **request):
            if not begun:  # not before the engine has agreed: a refusal is an answer of its own
                print('{"ok":true,"sessions":[' if arguments.json else show.sessions_head())
                begun = True
            answer["sessions"] = answer["sessions"][:left]
            left -= len(answer["sessions"])
            if arguments.json:
                for session in answer["sessions"]:
                    print(("" if first else ",") + json.dumps(session))
                    first = False
            else:
                sys.stdout.writelines(f"{line}\n" for line in show.sessions(answer))
            if left <= 0:
                break
    if arguments.json:
        print("]}")
    return 0


def do_status(arguments: argparse.Namespace) -> int:
    with Engine(arguments.socket) as engine:
        tell(engine.ask(cmd="status"), show.status, as_json=arguments.json)
    return 0


def do_who(arguments: argparse.Namespace) -> int:
    """Whose is this public address and port? By the sessions, and by arithmetic where a pool has that."""
    if not arguments.outside:
        raise UsageError("the address is empty; write ADDRESS or ADDRESS:PORT")
    with Engine(arguments.socket) as engine:
        found = [
            session
            for answer in engine.pages(cmd="show", what="sessions", outside=arguments.outside)
            for session in answer["sessions"]
        ]
        config = engine.ask(cmd="show", what="config")["config"]
    computed = []
    if any("deterministic" in pool for pool in config["pools"]):
        from dsnatctl.deterministic import shares

        address, _, port = arguments.outside.partition(":")
        computed = [str(share) for share in shares(config, address, int(port or 0))]
    if arguments.json:
        print(json.dumps({"ok": True, "sessions": found, "computed": computed}))
    else:
        for one in found:
            print(
                f"{one['inside']} has had {one['outside']} for {one['age_s']} s "
                f"({one['protocol']} to {one['remote']}, {one['state']})"
            )
        print(*computed, sep="\n", end="\n" if computed else "")
    if not found and not computed:
        print(f"dsnatctl: nobody has {arguments.outside} now", file=sys.stderr)
    return 0 if found or computed else FAILED


def do_explain(arguments: argparse.Namespace) -> int:
    from dsnatctl import explain

    try:
        raw = explain.packet(
            arguments.protocol,
            arguments.source,
            arguments.destination,
            flags=arguments.flags,
            size=arguments.size,
            ttl=arguments.ttl,
            whole=arguments.dont_fragment,
        )
    except explain.WrongPacket as error:
        raise UsageError(str(error)) from error
    request: Json = {"cmd": "explain", "if": arguments.interface, "pkt": raw.hex()}
    if arguments.config:
        request |= {"file": arguments.config, "text": text_of(arguments.config)}
    with Engine(arguments.socket) as engine:
        try:
            answer = engine.ask(**request)
        except Refused as refused:
            return wrong_file(refused, as_json=arguments.json)
    tell(answer, explain.lines, as_json=arguments.json)
    return FAILED if answer["verdict"] == "drop" else 0


def do_plan(arguments: argparse.Namespace) -> int:
    from dsnatctl import plan

    text = text_of(arguments.file)
    with Engine(arguments.socket) as engine:
        try:
            answer = plan.ask(engine, arguments.file, text)
        except Refused as refused:
            return wrong_file(refused, as_json=arguments.json)
    sys.stderr.writelines(f"{line}\n" for line in show.problems(answer))
    tell(answer, plan.lines, as_json=arguments.json)
    return 0


def do_rfc(arguments: argparse.Namespace) -> int:
    from dsnatctl import rfc

    with Engine(arguments.socket) as engine:
        answer = engine.ask(cmd="show", what="config")
    if arguments.json:
        found = rfc.given_up(answer["config"])
        print(
            json.dumps(
                {
                    "ok": True,
                    "given_up": [dict(zip(("setting", "clauses", "why"), one, strict=True)) for one in found],
                }
            )
        )
    else:
        sys.stdout.writelines(f"{line}\n" for line in rfc.lines(answer))
    return 0


def do_version(arguments: argparse.Namespace) -> int:
    def line(answer: Json) -> Iterator[str]:
        yield f"{answer['program']} {answer['version']}"

    with Engine(arguments.socket) as engine:
        tell(engine.ask(cmd="version"), line, as_json=arguments.json)
    return 0
