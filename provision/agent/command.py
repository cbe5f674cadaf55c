"""Arguments and requests -> one answer. Without arguments a request stands on standard input."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from . import announce, change, image, look, rekey, stage, undo
from .machine import Machine
from .protocol import PROTOCOL, Json, Refused, number_in, read_request
from .state import State

Verb = Callable[[State, Json], Json]

VERBS: dict[str, Verb] = {
    "facts": look.facts,
    "stage": stage.stage,
    "apply": change.apply,
    "confirm": change.confirm,
    "revert": undo.revert,
    "status": look.status,
    "history": lambda state, r: look.history(state, number_in(r, "last", 20, 1, 10_000)),
    "release": change.release,
    "describe": stage.describe,
    "drain": change.drain,
    "clear": change.clear,
    "exec": look.execute,
    "probe": look.probe,
    "adverts": look.adverts,
    "receive": image.receive,
    "update": image.update,
    "restart": image.restart,
    "rekey": rekey.rekey,
}

LOCAL: dict[str, Callable[[State], Json]] = {
    "status": lambda state: look.status(state, {}),
    "history": lambda state: look.history(state, 10_000),
    "revert": lambda state: undo.revert(state, {"reason": "asked for on the console"}),
    "boot": undo.boot,
    "change": lambda state: change.by_hand(state, read_request()),
}
"""For units of the gateway and for its console."""

BIRD_CONF = Path(os.environ.get("DSNAT_ETC", "/etc/dsnat")) / "bird.conf"


def reply(state: State, request: Json) -> Json:
    """What a request over the network is answered with."""
    if request.get("protocol") != PROTOCOL:
        raise Refused(
            "protocol",
            f"this gateway speaks protocol {PROTOCOL} and was asked in {request.get('protocol')}; "
            f"use a dsnat-fleet that fits its image",
        )
    verb = VERBS.get(str(request.get("do")))
    if verb is None:
        raise Refused("usage", f"there is no request {request.get('do')!r}; there are {', '.join(VERBS)}")
    return verb(state, request)


def main() -> int:
    # The change must not stop half-way because it cut the connection that ordered it.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    os.umask(0o022)
    root = Path(os.environ.get("DSNAT_ROOT", "/var/lib/dsnat"))
    state = State(Machine(root, os.environ.get("DSNAT_SOCKET", "/run/dsnatd/control.sock")))
    said: Json
    try:
        arguments = sys.argv[1:]
        if not arguments:
            result = reply(state, read_request())
        elif arguments[0] == "undo" and len(arguments) == 2:
            result = undo.undo(state, arguments[1])
        elif arguments[0] == "unkey" and len(arguments) == 2:
            result = rekey.unkey(state, arguments[1])
        elif arguments == ["announce"]:
            announce.announce(state.machine, BIRD_CONF)  # until it is ended
            result = {}
        elif arguments[0] in LOCAL and len(arguments) == 1:
            result = LOCAL[arguments[0]](state)
        else:
            words = " | ".join([*LOCAL, "announce", "undo ID", "unkey ID"])
            raise Refused("usage", f"usage: agent [{words}], or a request on standard input")
        said = {"protocol": PROTOCOL, "ok": True, "result": result}
    except Refused as refused:
        error = {"kind": refused.kind, "text": str(refused), **refused.more}
        said = {"protocol": PROTOCOL, "ok": False, "error": error}
    except OSError as failed:
        error = {"kind": "failed", "text": f"on the gateway: {failed}"}
        said = {"protocol": PROTOCOL, "ok": False, "error": error}
    except (TypeError, ValueError, KeyError) as wrong:  # who asks reads one line, never a traceback
        error = {"kind": "failed", "text": f"the agent cannot do this: {wrong!r}"}
        said = {"protocol": PROTOCOL, "ok": False, "error": error}
    with contextlib.suppress(OSError):  # nobody may be listening any more
        sys.stdout.write(json.dumps(said) + "\n")
        sys.stdout.flush()
    return 0 if said["ok"] else 1
