"""The words of the command line: every verb, its options, and the function that carries it out.

words.py makes the man page and the bash completion of it, so a help text here is a sentence there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from dsnatctl.act import do_clear, do_release, do_reload
from dsnatctl.ask import VIEWS, do_explain, do_plan, do_rfc, do_show, do_status, do_version, do_who
from dsnatctl.client import SOCKET
from dsnatctl.watch import do_capture, do_metrics, do_support, do_top

CONFIG = "/etc/dsnat/dsnatd.yaml"
STATES = ("opening", "established", "closing", "one_way", "two_way", "dns", "query", "hold")
Number = TypeVar("Number", int, float)


def parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--socket", default=SOCKET, metavar="PATH", help=f"default {SOCKET}")
    common.add_argument("--json", action="store_true", help="the engine's answer as JSON")
    common.add_argument("--debug", action="store_true", help="a traceback for an answer that cannot be read")
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
            one.add_argument("--seconds", type=none_or_more, default=0, metavar="S", help=text)
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
    explain.add_argument("--ttl", type=byte, default=64, metavar="N", help="default 64")
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
    capture.add_argument("--seconds", type=none_or_more, default=60, metavar="S", help="at most; default 60")
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


def add_filters(parser: argparse.ArgumentParser) -> None:
    end = "ADDRESS[/LENGTH][:PORT]"
    parser.add_argument("--host", metavar=end, help="the inside end")
    parser.add_argument("--remote", metavar=end, help="the far end")
    parser.add_argument("--outside", metavar=end, help="the public end")
    parser.add_argument("--protocol", choices=("tcp", "udp", "icmp"))
    parser.add_argument("--state", choices=STATES)
    parser.add_argument("--pool", metavar="NAME")
    parser.add_argument("--older-s", type=positive, metavar="S", help="begun at least S seconds ago")
    parser.add_argument("--younger-s", type=positive, metavar="S", help="begun less than S seconds ago")


def seconds(text: str) -> float:
    return within(text, float, 0.05, 86400.0)


def none_or_more(text: str) -> float:
    return within(text, float, 0.0, 86400.0)


def positive(text: str) -> int:
    return within(text, int, 1, sys.maxsize)


def byte(text: str) -> int:
    return within(text, int, 0, 255)


def within(text: str, kind: Callable[[str], Number], low: Number, high: Number) -> Number:
    with suppress(ValueError):
        number = kind(text)
        if low <= number <= high:  # never true of nan
            return number
    what = "a number" if kind is float else "a whole number"
    most = "up" if high == sys.maxsize else f"to {high:g}"
    raise argparse.ArgumentTypeError(f"{text!r} is not {what} from {low:g} {most}")
