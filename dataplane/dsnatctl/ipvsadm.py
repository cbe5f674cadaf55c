"""dsnat's own command, /usr/sbin/ipvsadm: what its documentation types, unchanged, answered by this gateway.

Both generations of dsnat are understood: addresses on the 0.0.0.0:0 service (2.6.32-220) and zones with
addresses (2.6.32-279). The documentation's copy has en dashes for hyphens; they are hyphens here.

    ipvsadm -A -t 0.0.0.0:0 -s rr                    translation of TCP: it is always on here
    ipvsadm -P -t 0.0.0.0:0 -z 1.2.100.1             an address for everybody: the zone 0.0.0.0/0
    ipvsadm -K --zone 1.1.0.0/16                     a zone; without address it drops, as it did
    ipvsadm -P --zone 1.1.0.0/16 -z 1.2.100.1        an address for a zone
    ipvsadm -Q | -V                                  take an address, a zone away; sessions drain
    ipvsadm -G | -ln [--stats|--rate] | -lnc | -L --timeout
    ipvsadm --set TCP TCPFIN UDP                     timeouts; 0 keeps
    ipvsadm -S | -R                                  print all as commands, read them back as one change

What it changes is the engine's configuration: it takes `show config`, edits zones and pools, and hands the
text to the agent, which makes it the next generation (owner "ipvsadm"). So a reboot keeps it, `dsnat-fleet
drift` names it, and a plan made before it is stale. An address is in one pool only: when a second zone is
given an address that a pool has already, the zone joins that pool, and is told so.

Exit status: 0 done, 2 wrong usage, 3 the engine cannot be reached, 130 interrupted, 255 refused (as the
original's -1).
"""

from __future__ import annotations

import getopt
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from dsnatctl import listing
from dsnatctl.answer import INTERRUPTED, hush
from dsnatctl.client import SOCKET, STRANGE, Engine, Refused, Unreachable, strange
from dsnatctl.listing import ANYBODY, PROTOCOLS, SERVICE, TIMEOUTS
from dsnatctl.rules import CommandError, Rules, parse_laddr, parse_zone

AGENT = "/usr/lib/dsnat/agent"
USAGE, UNREACHABLE, REFUSED = 2, 3, 255
LONG = {
    "add-service": "A", "edit-service": "E", "delete-service": "D", "clear": "C", "list": "L",
    "add-server": "a", "edit-server": "e", "delete-server": "d", "zero": "Z", "add-zone": "K",
    "del-zone": "V", "add-laddr": "P", "del-laddr": "Q", "get-laddr": "G", "restore": "R", "save": "S",
    "help": "h", "version": "v", "numeric": "n", "connection": "c", "tcp-service": "t", "udp-service": "u",
    "fwmark-service": "f", "scheduler": "s", "laddr": "z", "synproxy": "j", "real-server": "r",
    "weight": "w", "persistent": "p", "fullnat": "b", "netmask": "M", "gatewaying": "g", "ipip": "i",
    "masquerading": "m", "u-threshold": "x", "l-threshold": "y", "ipv6": "6",
}  # fmt: skip
COMMANDS = "AEDCLaedZKVPQGRShv"
NO_BALANCER = "this gateway translates sources, it is no load balancer"
BALANCING = {"r": "real servers", "w": "weights", "g": "forwarding methods", "i": "forwarding methods",
             "m": "forwarding methods", "b": "forwarding methods", "x": "thresholds", "y": "thresholds",
             "thresholds": "thresholds", "p": "persistence", "M": "persistence",
             "persistent-conn": "persistence", "pe": "persistence", "o": "one-packet scheduling",
             "ops": "one-packet scheduling", "6": "IPv6 services"}  # fmt: skip
LISTS = {"n", "c", "stats", "rate", "timeout", "exact", "sort", "nosort"}
TAKES = {"A": {"t", "u", "f", "s", "j"}, "E": {"t", "u", "f", "s", "j"}, "D": {"t", "u", "f"}, "C": set(),
         "L": {"t", "u", "f"} | LISTS, "Z": {"t", "u", "f", "zone"}, "K": {"zone"}, "V": {"zone"},
         "P": {"t", "u", "f", "zone", "z"}, "Q": {"t", "u", "f", "zone", "z"},
         "G": {"t", "u", "f", "zone", "n"}, "R": set(), "S": {"n"}, "set": set()}  # fmt: skip
NAMES = {"t": "service-address", "u": "service-address", "f": "fwmark-service", "z": "local-address"}


class UsageError(Exception):
    """Wrong words: exit status 2."""


@dataclass
class Arguments:
    command: str = ""
    values: dict[str, str] = field(default_factory=dict)

    def __contains__(self, option: str) -> bool:
        return option in self.values

    @property
    def service(self) -> str:
        """tcp or udp, when the command names the 0.0.0.0:0 service."""
        for option, protocol in PROTOCOLS.items():
            if option in self.values:
                if self.values[option] != SERVICE:
                    raise UsageError(f"{NO_BALANCER}: {SERVICE} is its service")
                return protocol
        if "f" in self.values:
            raise UsageError(f"{NO_BALANCER}: no firewall-mark services; zones choose by source prefix")
        return ""


def hyphens(word: str) -> str:
    """The documentation's copy has typographic dashes."""
    stripped = word.lstrip("-\u2013\u2014\u2015\u2212")
    dashes = len(word) - len(stripped)
    if not dashes or word[:dashes] == "-" * dashes:
        return word
    return ("--" if len(stripped) > 1 and stripped.partition("=")[0] in {*LONG, *FLAGS} else "-") + stripped


FLAGS = {"zone": True, "set": False, "stats": False, "rate": False, "timeout": False, "exact": False,
         "daemon": False, "sort": False, "nosort": False, "thresholds": False, "persistent-conn": False,
         "start-daemon": True, "stop-daemon": True, "ops": False, "pe": True}  # fmt: skip


def parse(words: Sequence[str]) -> tuple[Arguments, list[str]]:
    takes_value = "tufszjrwxyM"
    short = "".join(f"{c}:" if c in takes_value else c for c in "AEDCLlaedZKVPQGRShvnctufszjrwpgimboxyM6")
    long = [f"{name}=" if letter in takes_value else name for name, letter in LONG.items()]
    long += [f"{name}=" if value else name for name, value in FLAGS.items()]
    try:
        options, rest = getopt.gnu_getopt([hyphens(word) for word in words], short, long)
    except getopt.GetoptError as error:
        raise UsageError(f"{error}; see ipvsadm -h") from error
    arguments = Arguments()
    for name, value in options:
        name = name.lstrip("-")
        letter = LONG.get(name, name)
        letter = "L" if letter == "l" else letter
        if letter in ("start-daemon", "stop-daemon", "daemon"):
            raise UsageError("sessions are not synchronised by ipvsadm here; see the gateway's own standby")
        if (letter in COMMANDS and len(letter) == 1) or letter == "set":
            if arguments.command and arguments.command != letter:
                raise UsageError("give one command at a time; see ipvsadm -h")
            arguments.command = letter
        elif letter in arguments.values:
            raise UsageError(f"the option {name} is given twice")
        else:
            arguments.values[letter] = value
    judge(arguments, rest)
    return arguments, rest


def judge(arguments: Arguments, rest: Sequence[str]) -> None:
    """Does the command take these options? The original named the wrong one in its answer, by one."""
    command, names = arguments.command, {letter: name for name, letter in LONG.items()} | NAMES
    if command in ("a", "e", "d"):
        raise UsageError(f"{NO_BALANCER}: there are no real servers")
    for option in arguments.values:
        if option in BALANCING:
            raise UsageError(f"{NO_BALANCER}: it has no {BALANCING[option]}")
        # without a command it is a listing, as it was
        if option not in TAKES.get(command or "L", {option}):
            option, command = names.get(option, option), names.get(command, command)
            raise UsageError(f"Illegal '{option}' option with the '{command}' command")
    if len(arguments.values.keys() & {"t", "u", "f", "zone"}) > 1:
        raise UsageError("give one service or one zone, not both")
    if rest and command != "set":
        raise UsageError(f"unexpected argument {rest[0]}")


# ---- what changes ----


def change(rules: Rules, arguments: Arguments, rest: Sequence[str]) -> bool:
    """Does one command to the rules; False when it was no change."""
    command, protocol = arguments.command, arguments.service
    if command in ("A", "E", "D", "C"):
        if command != "C" and not protocol:
            raise UsageError("You need to supply the 'service-address' option for the command")
        if command in ("D", "C"):
            rules.notes.append("TCP, UDP and ICMP echo are always translated; delete zones to refuse hosts")
        if "j" in arguments:
            rules.notes.append("synproxy never worked for this service and is ignored")
        if arguments.values.get("s", "rr") != "rr":
            rules.notes.append("sessions take the addresses in turn, whatever the scheduler")
        return False
    if command == "set":
        set_timeouts(rules, rest)
        return True
    if protocol and command in ("P", "Q"):
        source = ANYBODY
        if command == "P" and all(zone["source"] != ANYBODY for zone in rules.zones):
            rules.add_zone(ANYBODY)
    elif "zone" in arguments:
        source = parse_zone(arguments.values["zone"])
    else:
        raise UsageError("You need to supply the 'zone' option for the command")
    if command in ("P", "Q") and "z" not in arguments:
        raise UsageError("You need to supply the 'local-address' option for the command")
    if command == "K":
        rules.add_zone(source)
    elif command == "V":
        rules.delete_zone(source)
    else:
        address = parse_laddr(arguments.values["z"])
        if protocol and command == "P" and already(rules, arguments):
            rules.notes.append(f"{address} is there already: TCP and UDP have the same addresses")
            return False
        (rules.add_address if command == "P" else rules.delete_address)(source, address)
    return True


def set_timeouts(rules: Rules, rest: Sequence[str]) -> None:
    if len(rest) != 3 or not all(word.isdecimal() for word in rest):
        raise UsageError("--set takes three numbers of seconds: tcp tcpfin udp; 0 keeps one")
    for name, seconds in zip(TIMEOUTS, map(int, rest), strict=True):
        if seconds:
            rules.config["timeouts"][name] = f"{seconds}s"


# ---- the command ----

Save = Callable[[str], None]


def save_generation(text: str) -> None:
    """The agent stages, applies and keeps it, or undoes it when the engine does not take it."""
    request = json.dumps({"owner": "ipvsadm", "files": {"dsnatd.yaml": {"text": text}}})
    try:
        done = subprocess.run([AGENT, "change"], input=request, capture_output=True, text=True, check=False)
        answer = json.loads(done.stdout)
    except (OSError, ValueError) as error:
        raise CommandError(f"{AGENT} cannot be used ({error}); is this a gateway?") from error
    if not answer.get("ok"):
        raise CommandError(str(answer.get("error", {}).get("text", "the agent refused the change")))
    if answer["result"].get("state") != "confirmed":
        raise CommandError(f"the change was undone: {answer['result'].get('reason')}")


def restore(rules: Rules, lines: Iterator[str]) -> None:
    """-R: zones and addresses begin from nothing, as with the original's ipvsadm-restore."""
    for zone in list(rules.zones):
        rules.delete_zone(zone["source"])
    for number, line in enumerate(lines, 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        try:
            arguments, rest = parse(words)
            if arguments.command == "P" and already(rules, arguments):
                continue
            change(rules, arguments, rest)
        except (UsageError, CommandError) as error:
            raise CommandError(f"line {number}: {error}; nothing was changed") from error


def already(rules: Rules, arguments: Arguments) -> bool:
    """In a zone that shares a pool, an address that the pool has is no error when it is read back."""
    source = ANYBODY if arguments.service else parse_zone(arguments.values.get("zone", ""))
    zone = next((z for z in rules.zones if z["source"] == source), {})
    owner = rules.owner(parse_laddr(arguments.values.get("z", "")))
    return bool(owner and owner["name"] == zone.get("pool"))


def run(words: Sequence[str], engine: Engine, *, save: Save, lines: Iterator[str]) -> Iterator[str]:
    arguments, rest = parse(words)
    command = arguments.command or ("L" if not words or "n" in arguments else "")
    rules = Rules(engine.ask(cmd="show", what="config")["config"])
    if command == "G":
        if "zone" in arguments:
            wanted = rules.find_zone(parse_zone(arguments.values["zone"]))
            rules.config["zones"] = [wanted]
        pools = engine.ask(cmd="show", what="pools")
        yield from listing.local_addresses(rules, pools, of_service=bool(arguments.service))
    elif command == "S":
        yield from listing.saved(rules)
    elif command == "Z":
        listing.ZERO.write_text(json.dumps(listing.traffic(engine)))
    elif command == "L":
        yield from list_(arguments, engine, rules)
    elif command == "R":
        restore(rules, lines)
        save(rules.text())
    elif command in COMMANDS or command == "set":
        if change(rules, arguments, rest):
            save(rules.text())
    else:
        raise UsageError("no command is given; see ipvsadm -h")
    yield from (f"ipvsadm: {note}" for note in rules.notes)


def list_(arguments: Arguments, engine: Engine, rules: Rules) -> Iterator[str]:
    status = engine.ask(cmd="status")
    only = [arguments.service] if arguments.service else list(PROTOCOLS.values())
    if "timeout" in arguments:
        yield f"Timeout (tcp tcpfin udp): {listing.timeouts(rules)}"
    elif "c" in arguments:
        yield from listing.connections(
            engine.pages(cmd="show", what="sessions", **({"protocol": only[0]} if len(only) == 1 else {}))
        )
    elif "stats" in arguments:
        names = ("Conns", "InPkts", "OutPkts", "InBytes", "OutBytes")
        yield from listing.figures(
            status,
            {p: f for p, f in listing.since_zero(listing.traffic(engine)).items() if p in only},
            names,
            exact="exact" in arguments,
        )
    elif "rate" in arguments:
        before, start = listing.traffic(engine), time.monotonic()
        time.sleep(1)  # a rate is a difference over time, and the engine keeps no history
        after, seconds_passed = listing.traffic(engine), time.monotonic() - start
        rates = {
            p: [round((b - a) / seconds_passed) for a, b in zip(before[p], after[p], strict=True)]
            for p in only
        }
        yield from listing.figures(
            status, rates, ("CPS", "InPPS", "OutPPS", "InBPS", "OutBPS"), exact="exact" in arguments
        )
    else:
        yield from listing.services(status, only)


def main(
    argv: Sequence[str] | None = None, *, socket_path: str = SOCKET, save: Save = save_generation
) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        arguments, _ = parse(words)
        if arguments.command == "h":
            print(__doc__.strip())
            return 0
        if arguments.command == "v":
            print("ipvsadm of the dsnat gateway (compatible with ipvsadm 1.26-dsnat)")
            return 0
        with Engine(socket_path) as engine:
            for line in run(words, engine, save=save, lines=iter(sys.stdin)):
                print(line, file=sys.stderr if line.startswith("ipvsadm: ") else sys.stdout)
        sys.stdout.flush()
        return 0
    except UsageError as error:
        print(f"ipvsadm: {error}", file=sys.stderr)
        return USAGE
    except (CommandError, Refused) as error:
        print(f"ipvsadm: {error}", file=sys.stderr)
        return REFUSED
    except Unreachable as error:
        print(f"ipvsadm: {error}", file=sys.stderr)
        return UNREACHABLE
    except STRANGE as error:
        print(f"ipvsadm: {strange(socket_path, error)}", file=sys.stderr)
        return UNREACHABLE
    except BrokenPipeError:
        hush()  # the reader (head, less) has seen enough
        return 0
    except OSError as error:
        print(f"ipvsadm: what was asked for cannot be written ({error.strerror})", file=sys.stderr)
        hush()
        return REFUSED
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
