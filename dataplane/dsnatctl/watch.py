"""Verbs that look for longer than one answer, or write down what they see.

    capture    packets until enough are there; lines, or a file for its owner only
    top        a screen until it is ended
    metrics    a page for Prometheus, until it is ended
    support    one archive of everything that helps to help; what cannot be had is named and no failure

Each is a module of its own, loaded when its verb is used: dsnatctl must start at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import ExitStack
from typing import BinaryIO

from dsnatctl.answer import FAILED, UsageError
from dsnatctl.client import Engine


def do_capture(arguments: argparse.Namespace) -> int:
    from dsnatctl import capture, pcapng

    if arguments.json and not arguments.write:
        raise UsageError("--json tells of a capture to a file; add --write FILE")
    try:
        request = capture.requests(
            flt=" ".join(arguments.filter),
            sample=arguments.sample,
            reasons=arguments.drops,
            snap=arguments.snap,
        )
    except capture.WrongFilter as error:
        raise UsageError(str(error)) from error
    with Engine(arguments.socket) as engine, ExitStack() as stack:
        meanings = engine.ask(cmd="show", what="counters", explain=True)["meanings"]
        wanted = capture.Capture(arguments.snap, arguments.count, arguments.seconds, arguments.size, meanings)
        if arguments.write:
            version = engine.ask(cmd="version")
            try:
                file = (
                    sys.stdout.buffer if arguments.write == "-" else open_for_packets(stack, arguments.write)
                )
            except OSError as error:
                raise UsageError(f"{arguments.write} cannot be written ({error.strerror})") from error
            wanted.writer = pcapng.Writer(
                file,
                version=f"{version['program']} {version['version']}",
                snap=arguments.snap,
                comment="dsnatctl capture: each packet before and after translation",
            )
        capture.run(engine, request, wanted)
    if arguments.json:
        figures = {key: wanted.figures[key] for key in ("seen", "matched", "lost")}
        print(json.dumps({"ok": True, "packets": wanted.packets, **figures}))
    else:
        print(f"dsnatctl: {capture.summary(wanted)}", file=sys.stderr)
    return 0


def open_for_packets(stack: ExitStack, path: str) -> BinaryIO:
    """For its owner only: packets are other people's."""
    opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    return stack.enter_context(os.fdopen(opened, "wb"))


def do_top(arguments: argparse.Namespace) -> int:
    from dsnatctl import top

    with Engine(arguments.socket) as engine:
        if arguments.json:
            raise UsageError("top is for people; scripts ask dsnatctl show ... --json")
        if not arguments.once and not sys.stdout.isatty():
            raise UsageError("top needs a terminal; --once prints one frame")
        if arguments.once:
            sys.stdout.writelines(f"{line}\n" for line in top.once(engine, arguments.seconds))
        else:
            top.live(engine, arguments.seconds)
    return 0


def do_metrics(arguments: argparse.Namespace) -> int:
    from dsnatctl import metrics

    host, _, port = arguments.listen.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"--listen is {arguments.listen!r}; write ADDRESS:PORT such as 0.0.0.0:9732")
    if arguments.once:
        sys.stdout.write(metrics.scrape(arguments.socket))
        return 0
    try:
        server = metrics.Server((host, int(port)), arguments.socket)
    except OSError as error:
        print(
            f"dsnatctl: cannot listen on {arguments.listen} ({error.strerror}); give another --listen",
            file=sys.stderr,
        )
        return FAILED
    with server:
        server.serve_forever()
    return 0


def do_support(arguments: argparse.Namespace) -> int:
    from dsnatctl import support

    path = arguments.output or support.default_name()
    try:
        archive = support.write(
            path, socket_path=arguments.socket, config=arguments.config, sessions=arguments.sessions
        )
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror}); give another --output") from error
    if arguments.json:
        told = {"ok": True, "file": path, "collected": archive.collected, "missing": archive.missing}
        print(json.dumps(told))
        return 0
    for one in archive.missing:
        print(f"dsnatctl: not collected: {one['what']}: {one['why']}", file=sys.stderr)
    print(f"{path}: {len(archive.collected)} items, {len(archive.missing)} could not be had")
    return 0
