"""Carrying a plan out: one function per gateway, one pool of threads, one Result each.

    dial -> stage -> apply                  the gateway has armed its own undo and runs the change
    dial again -> look -> confirm           only a connection that the change let in may keep it

`push_one` never guesses. When a connection is lost in the middle it looks again, as often as the
gateway's own deadline allows, and when that is over it asks what became of the change: kept, undone, or
not known, which is a failure and says so.

In a pair the backup goes first; the master follows only when the backup was confirmed. Pairs and lone
gateways go in waves: one, then a share, then the rest. The failure budget counts gateways over the whole
run; once it is spent no further gateway is begun, and those that were not are reported as such.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from provision.agent import PROTOCOL
from provision.model import Fleet, milliseconds
from provision.plan import Change, Running
from provision.render import Rendered
from provision.ssh import Connection, GatewayError, LostInFlight, RemoteTimeout, Unreachable, dial, target_of

AGENT = "/usr/lib/dsnat/agent"
FACTS_S = 30.0
STAGE_S = 120.0
APPLY_S = 300.0  # longer than the agent takes at most
PAUSE_S = 0.5  # between two looks at a gateway that does not answer yet


class AgentRefused(GatewayError):
    """The gateway understood and said no."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.word = kind


class NoAgent(GatewayError):
    word = "no-agent"


class Remote(Protocol):
    """A gateway that can be asked. In production a connection, in tests whatever answers."""

    def ask(
        self, request: Mapping[str, Any], *, deadline_s: float, stream: Iterable[bytes] = ()
    ) -> dict[str, Any]: ...


Dial = Callable[[str], AbstractContextManager[Remote]]


class SshRemote:
    def __init__(self, name: str, connection: Connection) -> None:
        self._name, self._connection = name, connection

    def ask(
        self, request: Mapping[str, Any], *, deadline_s: float, stream: Iterable[bytes] = ()
    ) -> dict[str, Any]:
        line = json.dumps({"protocol": PROTOCOL, **request}).encode() + b"\n"
        done = self._connection.run([AGENT], stdin=line, stream=stream, deadline_s=deadline_s)
        answer = next((text for text in reversed(done.output.splitlines()) if text.startswith("{")), None)
        if answer is None:
            said = done.output.strip().splitlines()[-1:] or [f"exit status {done.status}"]
            raise NoAgent(f"{self._name}: {AGENT} gave no answer ({said[0]}); is this a dsnat gateway?")
        try:
            value = json.loads(answer)
            ok = value["ok"]
        except (ValueError, KeyError, TypeError) as error:
            raise NoAgent(f"{self._name}: {AGENT} gave an answer that is not understood") from error
        if not ok:
            raise AgentRefused(str(value["error"]["kind"]), str(value["error"]["text"]))
        result: dict[str, Any] = value["result"]
        return result

    def __enter__(self) -> SshRemote:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()


def dialer(fleet: Fleet, directory: Path) -> Dial:
    def dial_one(name: str) -> SshRemote:
        return SshRemote(name, dial(target_of(fleet, name, directory)))

    return dial_one


# ---- asking many at once
# ----------------------------------------------------------------------------------------


def gather(names: Iterable[str], dial: Dial, *, jobs: int) -> dict[str, Running | GatewayError]:
    """The facts of each gateway, in one round trip each; a gateway that fails is its error."""

    def one(name: str) -> Running | GatewayError:
        try:
            with dial(name) as remote:
                return Running(name, remote.ask({"do": "facts"}, deadline_s=FACTS_S))
        except GatewayError as error:
            return error

    names = list(names)
    if not names:
        return {}
    with ThreadPoolExecutor(max_workers=max(1, min(jobs, len(names)))) as pool:
        return dict(zip(names, pool.map(one, names), strict=True))


# ---- one gateway
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What became of one gateway. `outcome` is the word of `--json`."""

    gateway: str
    outcome: str  # confirmed, pending, unchanged, reverted, stale, locked, failed, unreached, skipped
    text: str = ""
    generation: int | None = None
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        return self.outcome in ("confirmed", "pending", "unchanged")


@dataclass(frozen=True)
class Order:
    """How a push is to be made."""

    owner: str
    plan: str
    window_s: int = 60
    confirm: bool = True
    health_s: int = 30


Witness = Callable[[Running, Remote], "str | None"]
"""Looks at a gateway that runs the change, over a connection to it. None: all is well; else what is not."""


def push_one(
    change: Change,
    rendered: Rendered,
    dial: Dial,
    order: Order,
    *,
    witness: Witness,
    now: Callable[[], float] = time.monotonic,
    nap: Callable[[float], None] = time.sleep,
    say: Callable[[str, str], None] = lambda gateway, text: None,
) -> Result:
    """Stages, applies and confirms one gateway. Never raises for what a gateway does."""
    name, begun = change.gateway, now()

    def result(outcome: str, text: str = "", generation: int | None = None) -> Result:
        return Result(name, outcome, text, generation, round(now() - begun, 1))

    generation: int | None = None
    try:
        with dial(name) as remote:
            say(name, "staging")
            staged = remote.ask(_stage_request(change, rendered, order), deadline_s=STAGE_S)
            generation = int(staged["generation"])
            if staged["digest"] != change.digest:
                return result("failed", "the gateway wrote something else than was sent; nothing was applied")
            say(name, f"applying generation {generation}")
            return _apply(
                remote,
                name,
                change.base,
                generation,
                change.digest,
                dial,
                order,
                witness,
                now,
                nap,
                say,
                result,
            )
    except AgentRefused as refused:
        if generation is not None:
            _let_go(name, dial, order)
        outcome = {"stale": "stale", "locked": "locked", "reverted": "reverted"}.get(refused.word, "failed")
        return result(outcome, str(refused), generation)
    except Unreachable as error:
        return result("unreached", str(error), generation)
    except GatewayError as error:
        return result("failed", str(error), generation)


def roll_back_one(
    running: Running,
    to: int,
    digest: str,
    dial: Dial,
    order: Order,
    *,
    witness: Witness,
    now: Callable[[], float] = time.monotonic,
    nap: Callable[[float], None] = time.sleep,
    say: Callable[[str, str], None] = lambda gateway, text: None,
) -> Result:
    """Makes an older generation live, with the same net below it as any other change."""
    name, begun = running.gateway, now()

    def result(outcome: str, text: str = "", generation: int | None = None) -> Result:
        return Result(name, outcome, text, generation, round(now() - begun, 1))

    try:
        with dial(name) as remote:
            say(name, f"applying generation {to}")
            return _apply(
                remote, name, running.generation, to, digest, dial, order, witness, now, nap, say, result
            )
    except AgentRefused as refused:
        outcome = {"stale": "stale", "locked": "locked", "reverted": "reverted"}.get(refused.word, "failed")
        return result(outcome, str(refused), to)
    except Unreachable as error:
        return result("unreached", str(error), to)
    except GatewayError as error:
        return result("failed", str(error), to)


def _let_go(name: str, dial: Dial, order: Order) -> None:
    """What was staged will not be applied: the next operator need not wait for our lease to end."""
    with suppress(GatewayError), dial(name) as remote:
        remote.ask({"do": "release", "owner": order.owner}, deadline_s=FACTS_S)


def _stage_request(change: Change, rendered: Rendered, order: Order) -> dict[str, Any]:
    return {
        "do": "stage",
        "base": change.base,
        "owner": order.owner,
        "plan": order.plan,
        "files": {name: {"text": file.text, "mode": file.mode} for name, file in rendered.files.items()},
        "hardware": rendered.hardware,
        "interfaces": list(rendered.interfaces),
        "vrrp": list(rendered.vrrp),
        "health_s": order.health_s,
    }


def _apply(
    remote: Remote,
    name: str,
    base: int,
    generation: int,
    digest: str,
    dial: Dial,
    order: Order,
    witness: Witness,
    now: Callable[[], float],
    nap: Callable[[float], None],
    say: Callable[[str, str], None],
    result: Callable[..., Result],
) -> Result:
    request = {
        "do": "apply",
        "base": base,
        "generation": generation,
        "digest": digest,
        "owner": order.owner,
        "plan": order.plan,
        "window_s": order.window_s,
    }
    window_ends = now() + APPLY_S + order.window_s
    try:
        applied = remote.ask(request, deadline_s=APPLY_S)
        if applied["state"] == "reverted":
            return result("reverted", f"not healthy with the change: {applied['reason']}", generation)
        window_ends = now() + order.window_s
    except (LostInFlight, RemoteTimeout):
        pass  # it may have cut us off, or may still be at it: the gateway knows, we look
    if not order.confirm:
        return result("pending", f"waits for `confirm`, at most {order.window_s} s", generation)
    say(name, "confirming")
    return _confirm(name, generation, dial, order, witness, now, nap, window_ends, result)


def _confirm(
    name: str,
    generation: int,
    dial: Dial,
    order: Order,
    witness: Witness,
    now: Callable[[], float],
    nap: Callable[[float], None],
    window_ends: float,
    result: Callable[..., Result],
) -> Result:
    """Over new connections: until all witnesses agree, then keep it; when time is over, find out what
    became of it.
    """
    doubt = "the gateway was not reached again"
    grace_ends = window_ends + 60.0  # the gateway needs a moment to undo the change and be reachable again
    while now() < grace_ends:
        try:
            with dial(name) as remote:
                running = Running(name, remote.ask({"do": "facts"}, deadline_s=FACTS_S))
                over = _settled(running, generation, doubt, result)
                if over is not None:
                    return over
                if running.state == "live":
                    ill = witness(running, remote)
                    if ill is None:
                        verdict = {"connection": "new", "engine": "answers", "addresses": "where they belong"}
                        request = {"do": "confirm", "generation": generation, "witnesses": verdict}
                        remote.ask(request, deadline_s=FACTS_S)
                        return result("confirmed", "", generation)
                    doubt = ill
                    if now() > window_ends - 2 * PAUSE_S:
                        reason = f"a witness disagrees: {ill}"[:190]
                        with suppress(AgentRefused):
                            remote.ask(
                                {"do": "revert", "generation": generation, "reason": reason},
                                deadline_s=APPLY_S,
                            )
        except AgentRefused as refused:
            if refused.word == "reverted":
                return result("reverted", str(refused), generation)
            doubt = str(refused)
        except GatewayError as error:
            doubt = str(error)
        nap(PAUSE_S)
    text = f"not known whether the change was kept: {doubt}; a gateway that is up has undone it by itself"
    return result("failed", text, generation)


def _settled(running: Running, generation: int, doubt: str, result: Callable[..., Result]) -> Result | None:
    """Has the gateway decided without us?"""
    if running.state != "idle":
        return None
    if running.generation == generation:
        return result("confirmed", "", generation)
    last = running.facts.get("last") or {}
    if last.get("event") == "reverted" and last.get("tried") == generation:
        return result("reverted", f"undone by the gateway: {last.get('reason')} ({doubt})", generation)
    return None  # lost before it was applied; look until the time is over


# ---- the whole fleet
# --------------------------------------------------------------------------------------------


@dataclass
class Budget:
    """How many gateways may fail. Shared by all threads of a run."""

    allowed: int
    spent: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def spend(self) -> None:
        with self._lock:
            self.spent += 1

    @property
    def empty(self) -> bool:
        with self._lock:
            return self.spent > self.allowed


def units(fleet: Fleet, changes: Sequence[Change], running: Mapping[str, Running]) -> list[list[Change]]:
    """Gateways that must go one after the other: of a pair the backup, then the master."""
    found: dict[str, list[Change]] = {}
    for change in changes:
        found.setdefault(fleet.gateways[change.gateway].pair or f"gateway {change.gateway}", []).append(
            change
        )

    def masters_last(change: Change) -> tuple[int, int]:
        service = fleet.service_of(change.gateway)
        addresses = vrrp_addresses(fleet, change.gateway) if service.vrrp is not None else []
        return running[change.gateway].holds(addresses), fleet.gateways[change.gateway].priority

    return [sorted(members, key=masters_last) for members in found.values()]


def vrrp_addresses(fleet: Fleet, name: str) -> list[str]:
    vrrp = fleet.service_of(name).vrrp
    return [str(a.ip) for i in vrrp.instances.values() for a in i.addresses] if vrrp is not None else []


def waves(all_units: Sequence[list[Change]], first_percent: int) -> list[list[list[Change]]]:
    """One canary, then a share, then the rest."""
    one, rest = list(all_units[:1]), list(all_units[1:])
    share = max(1, len(all_units) * first_percent // 100)
    return [wave for wave in (one, rest[:share], rest[share:]) if wave]


def push_all(
    order_of_waves: Sequence[Sequence[list[Change]]],
    push: Callable[[Change], Result],
    *,
    jobs: int,
    budget: Budget,
    soak_s: float = 0.0,
    stop: threading.Event,
    done: Callable[[Result], None] = lambda result: None,
    nap: Callable[[float], None] = time.sleep,
) -> list[Result]:
    """`stop` (Ctrl-C) lets what is in flight end in a known state and begins nothing new."""
    results: list[Result] = []
    lock = threading.Lock()

    def note(result: Result) -> None:
        with lock:
            results.append(result)
        if not result.good:
            budget.spend()
        done(result)

    def one_unit(unit: list[Change]) -> None:
        broken: str | None = None
        for change in unit:
            if stop.is_set():
                note_skipped(change, "interrupted before it was begun")
            elif broken is not None:
                note_skipped(change, f"its peer {broken} failed; a pair is never changed on both sides then")
            elif budget.empty:
                note_skipped(change, "the failure budget is spent")
            else:
                try:
                    result = push(change)
                except Exception as error:  # a defect of ours must not lose the other gateways' results
                    result = Result(change.gateway, "failed", f"internal error: {error!r}")
                note(result)
                broken = None if result.good else change.gateway

    def note_skipped(change: Change, text: str) -> None:
        with lock:
            results.append(Result(change.gateway, "skipped", text))
        done(results[-1])

    for number, wave in enumerate(order_of_waves):
        if number and soak_s and not stop.is_set() and not budget.empty:
            nap(soak_s)
        with ThreadPoolExecutor(max_workers=max(1, min(jobs, len(wave)))) as pool:
            left: set[Future[None]] = {pool.submit(one_unit, list(unit)) for unit in wave}
            while left:
                try:
                    _, left = wait(left, return_when=FIRST_COMPLETED, timeout=0.5)
                except KeyboardInterrupt:
                    stop.set()
    return results


def witnesses(fleet: Fleet, name: str, rendered: Rendered, dial: Dial) -> Witness:
    """Who must agree before a change is kept: the engine, keepalived, the VRRP peer, and a probe outside.

    The addresses must be on exactly one of a pair, all of them; on a lone gateway, on itself. A backup has
    no way out to prove: the probe is for who carries the traffic."""
    addresses = list(rendered.vrrp)
    peer = fleet.peer_of(name)

    def probe(remote: Remote) -> str | None:
        if not rendered.probes:
            return None
        try:
            request = {"do": "probe", "addresses": list(rendered.probes)}
            answers = remote.ask(request, deadline_s=FACTS_S)["answers"]
        except AgentRefused as error:
            return str(error)
        silent = [address for address, good in answers.items() if not good]
        return f"{', '.join(silent)} does not answer from {name}" if silent else None

    def look(running: Running, remote: Remote) -> str | None:
        engine = running.facts.get("engine", {})
        if "error" in engine:
            return f"the engine does not answer: {engine['error']}"
        if not addresses:
            return probe(remote)
        active = running.facts.get("units", {}).get("keepalived")
        if active != "active":
            return f"keepalived is {active}"
        mine = running.holds(addresses)
        if mine or peer is None:
            silent = probe(remote)
            if silent is not None:
                return silent
        if mine not in (0, len(addresses)):
            return f"{name} holds {mine} of {len(addresses)} VRRP addresses"
        if peer is None:
            return None if mine else f"{name} does not hold its VRRP addresses yet"
        try:
            with dial(peer) as there:
                other = Running(peer, there.ask({"do": "facts"}, deadline_s=FACTS_S))
        except GatewayError as error:
            # A peer that is down cannot be asked; then this one must carry the addresses alone.
            return None if mine else f"the peer {peer} was not reached ({error}) and {name} is not master"
        theirs = other.holds(addresses)
        if bool(mine) == bool(theirs):
            who = "both of the pair hold" if mine else "neither of the pair holds"
            return f"{who} the VRRP addresses"
        return None

    return look


# ---- handing over
# -----------------------------------------------------------------------------------------------

HAND_OVER_S = 30.0


class NoHandOver(GatewayError):
    word = "hand-over"


def drain(
    fleet: Fleet,
    name: str,
    dial: Dial,
    *,
    on: bool,
    now: Callable[[], float] = time.monotonic,
    nap: Callable[[float], None] = time.sleep,
) -> str:
    """Lets the peer have the VRRP addresses, when it is well enough to; waits until it has them."""
    peer, addresses = fleet.peer_of(name), vrrp_addresses(fleet, name)

    def ask(gateway: str, request: dict[str, Any]) -> dict[str, Any]:
        with dial(gateway) as remote:
            return remote.ask(request, deadline_s=FACTS_S)

    if not on:
        ask(name, {"do": "drain", "on": False})
        return "takes part in VRRP again"
    if peer is None or not addresses:
        raise NoHandOver("has no peer to hand over to; only a gateway of a pair can be drained")
    other = Running(peer, ask(peer, {"do": "facts", "shows": []}))
    if other.facts.get("drained"):
        raise NoHandOver(f"its peer {peer} is drained itself; end that first with drain {peer} --undo")
    if "error" in other.facts.get("engine", {}) or other.facts.get("units", {}).get("keepalived") != "active":
        raise NoHandOver(f"its peer {peer} is not well (see status); nothing was handed over")
    ask(name, {"do": "drain", "on": True})
    end = now() + HAND_OVER_S
    while now() < end:
        if Running(peer, ask(peer, {"do": "facts", "shows": []})).holds(addresses) == len(addresses):
            return f"{peer} has the VRRP addresses now"
        nap(PAUSE_S)
    ask(name, {"do": "drain", "on": False})
    raise NoHandOver(
        f"{peer} did not take the addresses within {HAND_OVER_S:.0f} s; the hand-over was undone"
    )


def with_failover(
    fleet: Fleet,
    change: Change,
    running: Running,
    dial: Dial,
    push: Callable[[], Result],
    *,
    say: Callable[[str, str], None] = lambda gateway, text: None,
) -> Result:
    """A change that restarts the engine of a pair's master: its peer carries the traffic meanwhile."""
    name = change.gateway
    addresses = vrrp_addresses(fleet, name)
    needed = "engine-stop" in change.actions and fleet.peer_of(name) is not None and running.holds(addresses)
    if not needed:
        return push()
    try:
        say(name, f"handing over: {drain(fleet, name, dial, on=True)}")
    except GatewayError as error:
        return Result(name, "failed", f"its engine must restart, but {error}")
    try:
        return push()
    finally:
        with suppress(GatewayError):
            drain(fleet, name, dial, on=False)


def window_of(fleet: Fleet) -> int:
    return max(5, milliseconds(fleet.defaults.rollout.confirm_within) // 1000)
