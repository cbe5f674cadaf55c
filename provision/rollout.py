"""Many gateways: in what order, how many at a time, and when to stop.

In a pair the backup goes first; the master follows only when the backup was confirmed. Pairs and lone
gateways go in waves: one, then a share, then the rest. The failure budget counts gateways over the whole
run; once it is spent no further gateway is begun, and those that were not are reported as such.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from provision.journal import Journal
from provision.model import Fleet
from provision.plan import Change, Plan, Running
from provision.push import Attempt, Dial, Order, Result, nothing
from provision.render import Rendered
from provision.values import milliseconds


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
            try:
                nap(soak_s)
            except KeyboardInterrupt:
                stop.set()
        with ThreadPoolExecutor(max_workers=max(1, min(jobs, len(wave)))) as pool:
            left: set[Future[None]] = {pool.submit(one_unit, list(unit)) for unit in wave}
            while left:
                try:
                    _, left = wait(left, return_when=FIRST_COMPLETED, timeout=0.5)
                except KeyboardInterrupt:
                    stop.set()
    return results


def window_of(fleet: Fleet) -> int:
    return max(5, milliseconds(fleet.defaults.rollout.confirm_within) // 1000)


@dataclass(frozen=True)
class Rollout:
    """One run over the fleet: carries plans out, one after the other, under one budget and one journal."""

    fleet: Fleet
    dial: Dial
    order: Order
    budget: Budget
    jobs: int
    journal: Journal | None = None
    say: Callable[[str, str], None] = nothing
    ended: Callable[[Result], None] = lambda result: None
    stop: threading.Event = field(default_factory=threading.Event)
    now: Callable[[], float] = time.monotonic
    nap: Callable[[float], None] = time.sleep

    def carry_out(
        self, plan: Plan, wanted: Mapping[str, Rendered], running: Mapping[str, Running], *, last: bool = True
    ) -> list[Result]:
        """What became of every change of the plan. Not `last`: a step on the way, which `resume` repeats."""
        from provision.handover import with_failover
        from provision.witness import witnesses

        def one(change: Change) -> Result:
            name = change.gateway
            witness = witnesses(self.fleet, running[name], wanted[name], self.dial)
            attempt = Attempt(name, self.dial, self.order, witness, now=self.now, nap=self.nap, say=self.say)

            def push() -> Result:
                return attempt.push(change, wanted[name])

            return with_failover(self.fleet, change, running[name], self.dial, push, say=self.say)

        def done(result: Result) -> None:
            if self.journal is not None and (last or not result.good):
                line = {"gateway": result.gateway, "outcome": result.outcome, "text": result.text}
                self.journal.add(line)
            self.ended(result)

        settings = self.fleet.defaults.rollout
        return push_all(
            waves(units(self.fleet, plan.changes, running), settings.first_wave_percent),
            one,
            jobs=self.jobs,
            budget=self.budget,
            soak_s=milliseconds(settings.soak) / 1000,
            stop=self.stop,
            done=done,
            nap=self.nap,
        )
