"""Verbs that change something.

reload     the configuration file, whole or not at all: with an error in it nothing changes
clear      ends sessions; without a filter only when all are asked for by name
release    takes away what a stopped engine leaves in the kernel; packets leave untranslated from then
           on, so it wants --yes, and no engine that still needs its rules
"""

from __future__ import annotations

import argparse
import json
import sys

from dsnatctl import show
from dsnatctl.answer import FAILED, USAGE, UsageError, filters
from dsnatctl.client import Engine, Refused, Unreachable


def do_reload(arguments: argparse.Namespace) -> int:
    with Engine(arguments.socket) as engine:
        try:
            answer = engine.ask(cmd="reload", **({"cut": True} if arguments.cut else {}))
        except Refused as refused:
            if "problems" not in refused.answer:
                raise
            if arguments.json:
                print(json.dumps(refused.answer))
            sys.stderr.writelines(f"{line}\n" for line in show.problems(refused.answer))
            print("dsnatctl: nothing was changed; correct the file and reload again", file=sys.stderr)
            return USAGE
    if arguments.json:
        print(json.dumps(answer))
        return 0
    sys.stderr.writelines(f"{line}\n" for line in show.problems(answer))
    cut = f", {answer['cut']} sessions cut" if "cut" in answer else ""
    print(f"reloaded: {answer['pools']} pools, {answer['zones']} zones{cut}")
    return 0


def do_clear(arguments: argparse.Namespace) -> int:
    request = filters(arguments)
    if arguments.all:
        request["all"] = True
    if not request:
        raise UsageError("clear needs a filter such as --host ADDRESS, or --all")
    with Engine(arguments.socket) as engine:
        cleared = sum(answer["cleared"] for answer in engine.pages(cmd="clear", **request))
    print(json.dumps({"ok": True, "cleared": cleared}) if arguments.json else f"{cleared} sessions cleared")
    return 0


def do_release(arguments: argparse.Namespace) -> int:
    from dsnatctl.release import ReleaseError, release

    try:
        with Engine(arguments.socket):
            pass
    except Unreachable:
        pass
    else:
        print(
            "dsnatctl: dsnatd runs and needs its rules and twins; stop dsnatd.service first", file=sys.stderr
        )
        return FAILED
    if not arguments.yes:
        raise UsageError("after release this machine forwards packets untranslated; say so with --yes")
    try:
        done = release(arguments.config)
    except ReleaseError as error:
        print(f"dsnatctl: {error}", file=sys.stderr)
        return FAILED
    if arguments.json:
        print(json.dumps({"ok": True, "removed": done}))
    else:
        print("\n".join(f"removed {one}" for one in done) or "there was nothing to remove")
    return 0
