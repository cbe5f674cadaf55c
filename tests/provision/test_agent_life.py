"""Every order of events: an unconfirmed change always comes back, a confirmed one never does.

Operators stage, apply, confirm and read; services break; agents die and power goes between any two steps;
machines restart. The model knows one thing only: the generation that was confirmed last. Whenever the
dust settles, that is the one that is live, and the services run it.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from provision.agent import Json, Refused
from provision.agent.state import State
from tests.provision.machine import Client, FakeMachine, PowerCutError, snapshot_of

OPERATORS = st.sampled_from(["alice", "bob"])
RARELY = st.sampled_from([False, False, False, True])
STEPS = st.one_of(st.none(), st.none(), st.none(), st.integers(0, 14))  # how many durable steps go well


class Life(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        base = "/dev/shm" if Path("/dev/shm").is_dir() else None
        self.home = Path(tempfile.mkdtemp(prefix="dsnat-life-", dir=base))
        self.machine = FakeMachine(self.home / "dsnat")
        self.kept = 0
        self.texts: dict[int, str | None] = {0: None}
        self.staged: dict[str, Json] = {}
        self.count = 0

    def teardown(self) -> None:
        shutil.rmtree(self.home)

    def attempt(self, action: Callable[[], Json], steps: int | None, power: bool) -> Json | None:
        """Runs a request that may be refused, and may end because the agent or the machine dies."""
        self.machine.steps_left = steps
        try:
            return action()
        except Refused:
            return None
        except PowerCutError:
            self.machine.after_power_cut()
            if power:
                self.machine.boot_up()
            return None
        finally:
            self.machine.steps_left = None
            self.machine.undo_runs()

    @rule(who=OPERATORS, steps=STEPS, power=st.booleans(), bad=RARELY, hardware=st.sampled_from("hg"))
    def stage(self, who: str, steps: int | None, power: bool, bad: bool, hardware: str) -> None:
        self.count += 1
        marker = f"{self.count}{' BROKEN' if bad else ''}"
        answer = self.attempt(
            lambda: Client(self.machine, who).stage(marker, hardware=hardware), steps, power
        )
        for number in State(self.machine).numbers():
            path = self.machine.root / f"generations/{number}/dsnatd.yaml"
            self.texts.setdefault(number, path.read_text() if path.exists() else None)
        if answer is not None:
            assert not bad
            self.staged[who] = answer

    @rule(who=OPERATORS, steps=STEPS, power=st.booleans(), window_s=st.integers(5, 100))
    def apply(self, who: str, steps: int | None, power: bool, window_s: int) -> None:
        if who in self.staged:
            client = Client(self.machine, who)
            self.attempt(lambda: client.apply(self.staged[who], window_s), steps, power)

    @rule(who=OPERATORS, steps=STEPS, power=st.booleans(), old=RARELY, older=RARELY)
    def confirm(self, who: str, steps: int | None, power: bool, old: bool, older: bool) -> None:
        pending = State(self.machine).pending()
        if pending is None:
            return
        generation = pending["generation"] - older
        in_time = self.machine.now + 0.02 < pending.get("deadline", 0)
        file = self.machine.root / "pending"
        answer: Json | None = None

        def ask() -> Json:
            nonlocal answer
            try:
                answer = Client(self.machine, who).confirm(generation, fresh=not old)
            except PowerCutError:
                # The act itself is the removal of the file; what is lost after it is only the answer.
                assert self.machine._snapshot is not None
                if not (self.machine._snapshot / file.name).exists():
                    answer = {}
                raise
            return answer

        self.attempt(ask, steps, power)
        if answer is not None:
            assert not old
            assert not older
            assert in_time
            self.kept = generation

    @rule(who=OPERATORS, window_s=st.integers(5, 100))
    def change(self, who: str, window_s: int) -> None:
        """Straight to the state that matters most."""
        self.stage(who=who, steps=None, power=False, bad=False, hardware="h")
        self.apply(who=who, steps=None, power=False, window_s=window_s)

    @rule(who=OPERATORS, steps=STEPS, power=st.booleans())
    def revert(self, who: str, steps: int | None, power: bool) -> None:
        self.attempt(lambda: Client(self.machine, who).ask(do="revert"), steps, power)

    @rule(seconds=st.integers(1, 400), busy=RARELY)
    def time_passes(self, seconds: int, busy: bool) -> None:
        """On a busy machine the undo is late; a confirmation must not slip in before it."""
        self.machine.now += seconds
        if not busy:
            self.machine.undo_runs()

    @rule(verb=st.sampled_from(["facts", "status", "history"]))
    def read(self, verb: str) -> None:
        before = snapshot_of(self.machine.root)
        with contextlib.suppress(Refused):
            Client(self.machine, "carol").ask(do=verb)
        assert snapshot_of(self.machine.root) == before

    @rule()
    def restart(self) -> None:
        self.machine.boot_up()
        self.quiet()

    @rule(service=st.sampled_from(["dsnatd", "keepalived", "systemd-run", "none"]))
    def services(self, service: str) -> None:
        self.machine.broken = {service}

    @rule()
    def the_dust_settles(self) -> None:
        """Long enough for every deadline; an operator looks in, should an undo have died with its agent."""
        self.machine.broken = set()
        self.machine.now += 5_000
        self.machine.undo_runs()
        with contextlib.suppress(Refused):
            Client(self.machine, "alice").ask(do="stage", base=-1, files={"dsnatd.yaml": {"text": "x"}})
        self.quiet()

    def quiet(self) -> None:
        assert State(self.machine).pending() is None
        assert self.machine.live() == self.kept
        assert self.machine.running.get("dsnatd") == self.texts[self.kept]

    @invariant()
    def nothing_is_live_but_the_kept_or_the_pending(self) -> None:
        pending = State(self.machine).pending()
        allowed = {self.kept} | ({pending["generation"]} if pending else set())
        assert self.machine.live() in allowed
        if pending:
            assert pending["base"] == self.kept
            assert pending["id"] in self.machine.armed or pending["state"] == "armed"


TestLife = Life.TestCase
TestLife.settings = settings(
    max_examples=100, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
