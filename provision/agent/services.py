"""What a change asks of the services: the list of actions, playing it, and waiting until all are well."""

from __future__ import annotations

import re
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from .protocol import Json
from .state import State

ENGINE, VRRP, BGP = "dsnatd.yaml", "keepalived.conf", "bird.conf"


def actions_between(old: Json, new: Json) -> list[str]:
    """What has to be done to go from one generation to another, in order. The same list undoes it.

    A manifest says `files` (name -> SHA-256) and `hardware`, a digest of what the engine takes only at its
    start."""
    before, after = old.get("files", {}), new.get("files", {})

    def differs(*starts: str) -> bool:
        return any(
            before.get(n) != after.get(n) for n in before.keys() | after.keys() if n.startswith(starts)
        )

    restart = differs(ENGINE) and (old.get("hardware") != new.get("hardware") or ENGINE not in before)
    restart = restart or differs("sync.key")  # read at the engine's start
    actions: list[str] = []
    if differs(ENGINE):
        actions.append("failclosed")  # before anything may forward by the new rules
    if restart:
        actions += ["engine-stop", "nic"]  # a NIC changes its driver only when nobody uses it
    if differs("network/"):
        actions.append("network")
    if restart:
        actions.append("engine-start")
    elif differs(ENGINE):
        actions.append("engine-reload")
    if differs(VRRP):
        actions.append("keepalived")
    if differs(BGP):
        actions.append("bird")
    if differs("chrony/"):
        actions.append("time")
    return actions


def play(state: State, actions: list[str], target: Json) -> list[Json]:
    """Plays a list of actions so that the services run what `target` says. All of it, also after a
    failure.
    """
    has = target.get("files", {})

    def service(verb: str, unit: str) -> tuple[int, str]:
        return state.machine.run(["systemctl", verb, f"{unit}.service"])

    def engine_reload() -> tuple[int, str]:
        if ENGINE not in has:
            return service("stop", "dsnatd")
        _, text = service("is-active", "dsnatd")
        if text != "active":
            return service("restart", "dsnatd")
        try:
            state.machine.engine({"cmd": "reload"}, 30.0)
        except (OSError, ValueError) as error:
            return 1, str(error)
        return 0, ""

    todo: dict[str, Callable[[], tuple[int, str]]] = {
        "failclosed": lambda: service("reload-or-restart", "dsnat-failclosed"),
        "engine-stop": lambda: service("stop", "dsnatd"),
        "nic": lambda: service("reload-or-restart", "dsnat-nic"),
        "network": lambda: state.machine.run(["networkctl", "reload"], 30.0),
        "engine-start": lambda: service("restart" if ENGINE in has else "stop", "dsnatd"),
        "engine-reload": engine_reload,
        # Reloaded, never restarted while it runs: a restart lets the addresses go.
        "keepalived": lambda: service("reload-or-restart" if VRRP in has else "stop", "keepalived"),
        "bird": lambda: service("reload-or-restart" if BGP in has else "stop", "bird"),
        "time": lambda: (0, state.machine.run(["chronyc", "reload", "sources"], 10.0)[1]),
    }
    done: list[Json] = []
    for name in actions:
        state.machine.step(f"act {name}")
        status, text = todo[name]() if name in todo else (1, f"this agent knows no action {name}")
        done.append({"name": name, "ok": status == 0, "text": text or f"exit status {status}"})
    return done


def await_health(state: State, target: Json) -> list[Json]:
    """Waits for the services to be well, not longer than the generation says."""
    files = target.get("files", {})
    end = state.machine.clock() + float(target.get("health_s", 30))
    checks: dict[str, Callable[[], str | None]] = {}
    if ENGINE in files:
        checks["engine"] = lambda: engine_ill(state)
    if VRRP in files:
        checks["keepalived"] = lambda: unit_ill(state, "keepalived")
    if BGP in files:
        checks["bird"] = lambda: unit_ill(state, "bird")
    found: list[Json] = []
    for name, ill in checks.items():
        while (text := ill()) is not None and state.machine.clock() < end:
            state.machine.sleep(0.25)
        found.append({"name": f"health of {name}", "ok": text is None, "text": text or "well"})
    return found


def engine_ill(state: State) -> str | None:
    try:
        state.machine.engine({"cmd": "status"})
    except (OSError, ValueError) as error:
        return f"dsnatd does not answer on its control socket ({error})"
    return None


def unit_ill(state: State, unit: str) -> str | None:
    _, text = state.machine.run(["systemctl", "is-active", f"{unit}.service"], 10.0)
    return None if text == "active" else f"{unit}.service is {text}"


def pool_addresses(file: Path) -> list[tuple[int, int]]:
    """First and last address of everything that the pools of a dsnatd.yaml of ours have. The engine itself
    also lists those that have left, as long as sessions use them.
    """
    found: list[tuple[int, int]] = []
    for listed in re.findall(r"(?m)^    addresses:\n((?:      .*\n)+)", file.read_text()):
        for word in re.findall(r"(?m)^      - (?:range: )?([0-9][0-9./-]*)$", listed):
            low, _, high = word.partition("-")
            net = IPv4Network(low)
            found.append((int(net[0]), int(IPv4Address(high)) if high else int(net[-1])))
    return found
