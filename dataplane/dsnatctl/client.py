"""The control socket's client: one JSON request a line, one JSON answer a line."""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

SOCKET = "/run/dsnatd/control.sock"
Json = dict[str, Any]

# What reading an answer raises that dsnatd would not have given: another program listens, or another version.
STRANGE = (LookupError, TypeError, AttributeError, ValueError)


def strange(path: str, error: Exception) -> str:
    what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
    return f"the answer on {path} is not one of this version's dsnatd ({what}); give another --socket"


class Unreachable(Exception):
    """There is no engine to talk to, or it stopped talking."""


class Refused(Exception):
    """The engine's answer is no. `answer` is what it said."""

    def __init__(self, answer: Json) -> None:
        super().__init__(str(answer.get("error", "the engine refused without a reason")))
        self.answer = answer


class Engine:
    def __init__(self, path: str = SOCKET, *, timeout_s: float = 30.0) -> None:
        self.path = path
        self._buffer = b""
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(timeout_s)
        try:
            self._socket.connect(path)
        except FileNotFoundError as error:
            raise Unreachable(f"{path} is not there: dsnatd does not run; start dsnatd.service") from error
        except ConnectionRefusedError as error:
            if not stat.S_ISSOCK(os.stat(path).st_mode):  # noqa: PTH116 (pathlib costs a start more than that)
                raise Unreachable(f"{path} is not a socket; give dsnatd's with --socket") from error
            raise Unreachable(
                f"nobody listens on {path}: dsnatd was killed; see journalctl -u dsnatd"
            ) from error
        except PermissionError as error:
            raise Unreachable(f"you may not use {path}; become root or join the socket's group") from error
        except OSError as error:
            reason = error.strerror or error
            raise Unreachable(
                f"{path or 'an empty path'} cannot be used ({reason}); give another --socket"
            ) from error

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def ask(self, **request: Any) -> Json:
        """Raises Refused when the answer is not ok."""
        return self.ask_all([request])[0]

    def ask_all(self, requests: Sequence[Json]) -> list[Json]:
        """All requests in one go: on a busy machine it is the waiting for one another that takes time."""
        lines = b"".join(json.dumps(one, separators=(",", ":")).encode() + b"\n" for one in requests)
        try:
            self._socket.sendall(lines)
            return [self._judged(self._read_line()) for _ in requests]
        except TimeoutError as error:
            raise Unreachable("dsnatd did not answer in time; see dsnatctl status and journalctl") from error
        except OSError as error:
            raise Unreachable(f"dsnatd ended the connection ({error.strerror}); try again") from error

    def _judged(self, line: bytes) -> Json:
        try:
            answer = json.loads(line)
        except ValueError as error:
            raise Unreachable(f"what answers on {self.path} is not dsnatd; give another --socket") from error
        if not isinstance(answer, dict) or "ok" not in answer:
            raise Unreachable(f"what answers on {self.path} is not dsnatd; give another --socket")
        if not answer["ok"]:
            raise Refused(answer)
        return answer

    def pages(self, **request: Any) -> Iterator[Json]:
        """Asks again with the cursor of each answer until there is no more."""
        while True:
            answer = self.ask(**request)
            yield answer
            if "next" not in answer:
                return
            request["cursor"] = answer["next"]

    def _read_line(self) -> bytes:
        parts = [self._buffer]
        while b"\n" not in parts[-1]:
            part = self._socket.recv(1 << 20)
            if not part:
                raise Unreachable("dsnatd ended the connection without an answer; try again")
            parts.append(part)
        line, _, self._buffer = b"".join(parts).partition(b"\n")
        return line
