"""Carrying a plan out: one function per gateway, one pool of threads, one Result each.

    dial -> stage -> apply                  the gateway has armed its own undo and runs the change
    dial again -> look -> confirm           only a connection that the change let in may keep it

An attempt never guesses. When a connection is lost in the middle it looks again, as often as the
gateway's own deadline allows, and when that is over it asks what became of the change: kept, undone, or
not known, which is a failure and says so.

Many gateways, their order and when to stop: rollout.py. Who must agree: witness.py.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from provision.agent import PROTOCOL
from provision.model import Fleet
from provision.plan import Change, Running
from provision.render import Rendered
from provision.ssh import Connection, GatewayError, LostInFlight, RemoteTimeout, Unreachable, dial, target_of

AGENT = "/usr/lib/dsnat/agent"
FACTS_S = 60.0  # a gateway that is busy booting takes its time
STAGE_S = 120.0
APPLY_S = 300.0  # longer than the agent takes at most
AGREED = {"connection": "new", "engine": "answers", "addresses": "where they belong"}
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
        # who is given long to connect is slow to answer too
        deadline_s = max(deadline_s, 3 * self._connection.timeout_s)
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
                facts = remote.ask({"do": "facts"}, deadline_s=FACTS_S)
                return Running(name, {**facts, "asked_at": time.time()})
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


def nothing(gateway: str, text: str) -> None:
    """Where nobody wants to hear how far it is."""


@dataclass(frozen=True)
class Attempt:
    """One change of one gateway, from the first connection to what became of it."""

    name: str
    dial: Dial
    order: Order
    witness: Witness
    now: Callable[[], float] = time.monotonic
    nap: Callable[[float], None] = time.sleep
    say: Callable[[str, str], None] = nothing

    def push(self, change: Change, rendered: Rendered) -> Result:
        """Stages, applies and confirms. Never raises for what a gateway does."""

        def stage(remote: Remote) -> tuple[int, str]:
            self.say(self.name, "staging")
            staged = remote.ask(_stage_request(change, rendered, self.order), deadline_s=STAGE_S)
            if staged["digest"] != change.digest:
                raise NoAgent("the gateway wrote something else than was sent; nothing was applied")
            return int(staged["generation"]), change.digest

        return self._run(change.base, stage)

    def roll_back(self, running: Running, to: int, digest: str) -> Result:
        """Makes an older generation live, with the same net below it as any other change."""
        return self._run(running.generation, lambda remote: (to, digest))

    def _run(self, base: int, stage: Callable[[Remote], tuple[int, str]]) -> Result:
        begun, generation = self.now(), None

        def became(outcome: str, text: str = "") -> Result:
            return Result(self.name, outcome, text, generation, round(self.now() - begun, 1))

        try:
            with self.dial(self.name) as remote:
                generation, digest = stage(remote)
                self.say(self.name, f"applying generation {generation}")
                asked = self.now()
                outcome, text, window_ends = self._apply(remote, base, generation, digest)
            if outcome in ("live", "lost"):
                self.say(self.name, "confirming" if self.order.confirm else "looking what became of it")
                outcome, text = self._confirm(generation, window_ends, asked)
            return became(outcome, text)
        except AgentRefused as refused:
            if generation is not None:
                self._let_go()
            known = ("stale", "locked", "reverted")
            return became(refused.word if refused.word in known else "failed", str(refused))
        except Unreachable as error:
            return became("unreached", str(error))
        except GatewayError as error:
            return became("failed", str(error))

    def _let_go(self) -> None:
        """What was staged will not be applied: the next operator need not wait for our lease to end."""
        with suppress(GatewayError), self.dial(self.name) as remote:
            remote.ask({"do": "release", "owner": self.order.owner}, deadline_s=FACTS_S)

    def _apply(self, remote: Remote, base: int, generation: int, digest: str) -> tuple[str, str, float]:
        """Outcome and text as of a result, or "live" or "lost", and until when it must be confirmed."""
        order = self.order
        request = {
            "do": "apply",
            "base": base,
            "generation": generation,
            "digest": digest,
            "owner": order.owner,
            "plan": order.plan,
            "window_s": order.window_s,
        }
        window_ends = self.now() + APPLY_S + order.window_s
        with suppress(LostInFlight, RemoteTimeout):
            # It may have cut us off, or may still be at it: the gateway knows, we look.
            applied = remote.ask(request, deadline_s=APPLY_S)
            if applied["state"] == "reverted":
                return "reverted", f"not healthy with the change: {applied['reason']}", 0.0
            window_ends = self.now() + order.window_s
            return ("live", "", window_ends) if order.confirm else (*self._pending(), 0.0)
        return "lost", "", window_ends

    def _pending(self) -> tuple[str, str]:
        return "pending", f"waits for `confirm`, at most {self.order.window_s} s"

    def _confirm(self, generation: int, window_ends: float, asked: float) -> tuple[str, str]:
        """Over new connections: until all witnesses agree, then keep it; when time is over, find out what
        became of it. `asked`: when it was told to apply the change.
        """
        doubt = "the gateway was not reached again"
        grace_ends = window_ends + 60.0  # the gateway needs a moment to undo it and be reachable again
        while self.now() < grace_ends:
            try:
                with self.dial(self.name) as remote:
                    running = Running(self.name, remote.ask({"do": "facts"}, deadline_s=FACTS_S))
                    over = _settled(running, generation, doubt, self.now() - asked)
                    if over is not None:
                        return over
                    if running.state == "live" and not self.order.confirm:
                        return self._pending()
                    if running.state == "live":
                        ill = self.witness(running, remote)
                        if ill is None:
                            request = {"do": "confirm", "generation": generation, "witnesses": AGREED}
                            kept = remote.ask(request, deadline_s=FACTS_S)
                            return "confirmed", _receipt(kept)
                        doubt = ill
                        if self.now() > window_ends - 2 * PAUSE_S:
                            reason = f"a witness disagrees: {ill}"[:190]
                            undo = {"do": "revert", "generation": generation, "reason": reason}
                            with suppress(AgentRefused):
                                remote.ask(undo, deadline_s=APPLY_S)
            except AgentRefused as refused:
                if refused.word == "reverted":
                    return "reverted", str(refused)
                doubt = str(refused)
            except GatewayError as error:
                doubt = str(error)
            self.nap(PAUSE_S)
        text = f"not known whether the change was kept: {doubt}; a gateway that is up has undone it by itself"
        return "failed", text


def _receipt(kept: Mapping[str, Any]) -> str:
    """The gateway's own record of the change, by which it is found in its journal and history."""
    if kept.get("receipt") == "":
        return "but not in the gateway's history, which cannot be written; is its /var full?"
    return f"receipt {kept['receipt'][:16]}" if kept.get("receipt") else ""


def _settled(running: Running, generation: int, doubt: str, since_s: float) -> tuple[str, str] | None:
    """Has the gateway decided without us?"""
    if running.state != "idle":
        return None
    if running.generation == generation:
        return "confirmed", _receipt(running.facts.get("last") or {})
    last = running.facts.get("last") or {}
    if last.get("event") == "reverted" and last.get("tried") == generation:
        return "reverted", f"undone by the gateway: {last.get('reason')} ({doubt})"
    if float(running.facts.get("uptime_s", since_s)) + 1.0 < since_s:
        return "failed", "the gateway restarted before it applied the change; push again"
    return None  # on its way, or lost; look until the time is over


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
