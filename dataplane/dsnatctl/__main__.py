"""dsnatctl: ask the engine, and tell it what to do.

Exit status: 0 done, 1 the engine refused or a command failed, 2 wrong usage or an invalid configuration file,
3 the engine cannot be reached, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import BinaryIO

from dsnatctl import show, sync
from dsnatctl.client import SOCKET, Engine, Json, Refused, Unreachable

CONFIG = "/etc/dsnat/dsnatd.yaml"
FAILED, USAGE, UNREACHABLE, INTERRUPTED = 1, 2, 3, 130
FILTERS = ("host", "remote", "outside", "protocol", "state", "pool", "older_s", "younger_s")
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


def do_status(arguments: argparse.Namespace) -> int:
    with Engine(arguments.socket) as engine:
        tell(engine.ask(cmd="status"), show.status, as_json=arguments.json)
    return 0


def do_who(arguments: argparse.Namespace) -> int:
    """Whose is this public address and port? By the sessions, and by arithmetic where a pool has that."""
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


def text_of(file: str) -> str:
    from pathlib import Path

    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read ({error}); give a configuration file") from error


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


def open_for_packets(stack: ExitStack, path: str) -> BinaryIO:
    """For its owner only: packets are other people's."""
    opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    return stack.enter_context(os.fdopen(opened, "wb"))


def wrong_file(refused: Refused, *, as_json: bool) -> int:
    """The candidate file has errors: all of them."""
    if "problems" not in refused.answer:
        raise refused
    if as_json:
        print(json.dumps(refused.answer))
    sys.stderr.writelines(f"{line}\n" for line in show.problems(refused.answer))
    return USAGE


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
            f"dsnatctl: cannot listen on {arguments.listen} ({error.strerror}); free the port",
            file=sys.stderr,
        )
        return FAILED
    with server:
        server.serve_forever()
    return 0


def do_version(arguments: argparse.Namespace) -> int:
    def line(answer: Json) -> Iterator[str]:
        yield f"{answer['program']} {answer['version']}"

    with Engine(arguments.socket) as engine:
        tell(engine.ask(cmd="version"), line, as_json=arguments.json)
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


class UsageError(Exception):
    """Right words, wrong combination."""


def tell(answer: Json, view: Callable[[Json], Iterator[str]], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(answer))
    else:
        sys.stdout.writelines(f"{line}\n" for line in view(answer))


def filters(arguments: argparse.Namespace) -> Json:
    """What was given. An empty one is a mistake: `clear --host "$UNSET" --pool a` would end all of them."""
    given = {name: value for name in FILTERS if (value := getattr(arguments, name, None)) is not None}
    for name, value in given.items():
        if value == "":
            raise UsageError(f"--{name.replace('_', '-')} is empty; give it a value, or leave it out")
    return given


def add_filters(parser: argparse.ArgumentParser) -> None:
    end = "ADDRESS[/LENGTH][:PORT]"
    parser.add_argument("--host", metavar=end, help="the inside end")
    parser.add_argument("--remote", metavar=end, help="the far end")
    parser.add_argument("--outside", metavar=end, help="the public end")
    parser.add_argument("--protocol", choices=("tcp", "udp", "icmp"))
    parser.add_argument("--state", help="opening, established, closing, one_way, two_way")
    parser.add_argument("--pool", metavar="NAME")
    parser.add_argument("--older-s", type=positive, metavar="S", help="begun at least S seconds ago")
    parser.add_argument("--younger-s", type=positive, metavar="S", help="begun less than S seconds ago")


def parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--socket", default=SOCKET, metavar="PATH", help=f"default {SOCKET}")
    common.add_argument("--json", action="store_true", help="the engine's answer as JSON")
    top = argparse.ArgumentParser(
        prog="dsnatctl",
        description="Ask the NAT engine, and tell it what to do.",
        epilog="exit status: 0 done, 1 refused or failed, 2 wrong usage or configuration, 3 no engine",
    )
    verbs = top.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        one = verbs.add_parser(name, help=text, description=text, parents=[common])
        one.set_defaults(run=run)
        return one

    whats = verbs.add_parser(
        "show", help="sessions, pools, destinations, zones, counters, workers, ports, config or sync"
    )
    what = whats.add_subparsers(metavar="WHAT", dest="what", required=True)
    for name in ("sessions", *VIEWS):
        one = what.add_parser(name, parents=[common])
        one.set_defaults(run=do_show)
        if name == "sessions":
            add_filters(one)
        if name == "pools":
            one.add_argument("--pool", metavar="NAME", help="only this one")
        if name in ("pools", "destinations"):
            text = "look twice, S apart: when scarce ports will be spent"
            one.add_argument("--seconds", type=float, default=0, metavar="S", help=text)
        if name in ("sessions", "pools", "destinations"):
            one.add_argument("--limit", type=positive, metavar="N", help="at most N rows")
    verb("status", do_status, "is the engine well, and what does it run")
    reload = verb(
        "reload", do_reload, "read the configuration file again; changes nothing if it has an error"
    )
    reload.add_argument("--cut", action="store_true", help="end sessions whose address leaves, at once")
    clear = verb("clear", do_clear, "end sessions")
    add_filters(clear)
    clear.add_argument("--all", action="store_true", help="every session")
    who = verb("who", do_who, "which host has a public address and port, by sessions and by arithmetic")
    who.add_argument("outside", metavar="ADDRESS[:PORT]")
    plan = verb("plan", do_plan, "what a configuration file would change, and whose sessions")
    plan.add_argument("file", metavar="FILE")
    explain = verb("explain", do_explain, "what the engine would do with a packet, step by step, and why")
    explain.add_argument("interface", metavar="INTERFACE", help="where the packet comes in")
    explain.add_argument("protocol", choices=("tcp", "udp", "icmp"))
    explain.add_argument("source", metavar="ADDRESS:PORT", help="icmp: ADDRESS or ADDRESS:IDENTIFIER")
    explain.add_argument("destination", metavar="ADDRESS:PORT")
    explain.add_argument("--config", metavar="FILE", help="by this candidate file, with the live sessions")
    explain.add_argument("--flags", default="S", help="TCP flags, letters of FSRPAU; default S")
    explain.add_argument("--size", type=int, default=0, metavar="BYTES", help="length of the IPv4 packet")
    explain.add_argument("--ttl", type=int, default=64, choices=range(256), metavar="N", help="default 64")
    explain.add_argument("--dont-fragment", action="store_true", help="set DF")
    capture = verb("capture", do_capture, "packets before and after translation, in lines or to a file")
    capture.add_argument(
        "filter", nargs="*", metavar="FILTER", help="as of tcpdump, such as: host 100.64.1.2"
    )
    capture.add_argument("-w", "--write", metavar="FILE", help="to this pcapng file; -: standard output")
    capture.add_argument(
        "--drops",
        action="append",
        metavar="REASON",
        help="only packets dropped or passed for it; may be repeated",
    )
    capture.add_argument("--sample", type=positive, default=1, metavar="N", help="one in N; default 1")
    capture.add_argument("--count", type=positive, default=1000, metavar="N", help="at most; default 1000")
    capture.add_argument("--seconds", type=float, default=60, metavar="S", help="at most; default 60")
    capture.add_argument(
        "--size",
        type=positive,
        default=100_000_000,
        metavar="BYTES",
        help="of the file, at most; default 100 MB",
    )
    capture.add_argument(
        "--snap", type=positive, default=2048, metavar="BYTES", help="of each packet; default 2048"
    )
    top_ = verb("top", do_top, "a live screen: rates of workers, pools, drops and destinations")
    top_.add_argument("--once", action="store_true", help="print one frame and end")
    top_.add_argument(
        "--seconds", type=seconds, default=1.0, metavar="S", help="between two looks; default 1"
    )
    support = verb(
        "support", do_support, "one archive for help: configuration without secrets, counters, journal, NICs"
    )
    support.add_argument("--output", metavar="FILE", help="default: dsnat-support-HOST-TIME.tar.gz here")
    support.add_argument("--config", default=CONFIG, metavar="FILE", help=f"default {CONFIG}")
    support.add_argument("--sessions", action="store_true", help="the session table too: it names hosts")
    verb("rfc", do_rfc, "which clauses of the NAT RFCs the running settings give up")
    metrics = verb("metrics", do_metrics, "serve the engine's figures to Prometheus")
    metrics.add_argument("--listen", default=":9732", metavar="[ADDRESS]:PORT", help="default :9732")
    metrics.add_argument("--once", action="store_true", help="print them once instead")
    release = verb(
        "release", do_release, "remove the fail-closed rules and twins that a stopped engine leaves"
    )
    release.add_argument("--yes", action="store_true", help="I know that packets then leave untranslated")
    release.add_argument("--config", default=CONFIG, metavar="FILE", help=f"default {CONFIG}")
    verb("version", do_version, "the version of the engine that runs")
    return top


def seconds(text: str) -> float:
    number = float(text)
    if not 0.05 <= number <= 3600:
        raise ValueError
    return number


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except Unreachable as error:
        print(f"dsnatctl: {error}", file=sys.stderr)
        return UNREACHABLE
    except Refused as error:
        if arguments.json:
            print(json.dumps(error.answer))
        print(f"dsnatctl: {error}", file=sys.stderr)
        return FAILED
    except UsageError as error:
        print(f"dsnatctl: {error}", file=sys.stderr)
        return USAGE
    except BrokenPipeError:
        # the reader (head, less) has seen enough; nothing may be written at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"dsnatctl: what was asked for cannot be written ({error.strerror})", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # at exit either
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
