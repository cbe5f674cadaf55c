"""The gateway's side of the fleet tool: one request in, one answer out; only `announce` keeps running.

`dsnat-fleet` opens an SSH connection, starts this program and writes one line of JSON to it; the answer
is one line of JSON. Standard library only, so that it runs on a gateway as it is. The image installs this
folder as /usr/lib/dsnat/dsnat_agent, and /usr/lib/dsnat/agent leads to its `__main__.py`.

    command.py     arguments and requests -> one answer; what each is called
    protocol.py    requests as values, and how one is refused
    state.py       what a gateway keeps on disk, and who may change it
    stage.py       a new generation, judged by the gateway's own programs
    change.py      the life of a change: applied and confirmed
    undo.py        or put back: at the deadline, at boot, on request
    services.py    what a change asks of the services
    look.py        requests that only read
    rekey.py       another SSH host key
    image.py       a new image for the other slot
    announce.py    a unit of its own: BIRD announces this gateway while the engine is well
    machine.py     all that is asked of the gateway itself; a test replaces it
    disk.py        files that survive a power cut
"""

from __future__ import annotations

from .protocol import PROTOCOL, Json, Refused

__all__ = ["PROTOCOL", "Json", "Refused"]
