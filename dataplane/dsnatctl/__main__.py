"""dsnatctl: ask the engine, and tell it what to do.

Every way to end stands here: a verb's own status, or one sentence on standard error for what stopped it.

Exit status: 0 done, 1 the engine refused or a command failed, 2 wrong usage or an invalid configuration file,
3 the engine cannot be reached, 130 interrupted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from dsnatctl.answer import FAILED, INTERRUPTED, UNREACHABLE, USAGE, UsageError, hush
from dsnatctl.arguments import parser
from dsnatctl.client import STRANGE, Refused, Unreachable, strange


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except Unreachable as error:
        print(f"dsnatctl: {error}", file=sys.stderr)
        return UNREACHABLE
    except Refused as error:
        if arguments.json:
            print(json.dumps(error.answer))
        print(f"dsnatctl: {error}", file=sys.stderr)
        return FAILED
    except UsageError as error:
        print(f"dsnatctl: {error}", file=sys.stderr)
        return USAGE
    except BrokenPipeError:
        hush()  # the reader (head, less) has seen enough
        return 0
    except OSError as error:
        print(f"dsnatctl: what was asked for cannot be written ({error.strerror})", file=sys.stderr)
        hush()
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except STRANGE as error:
        if arguments.debug:
            raise
        print(f"dsnatctl: {strange(arguments.socket, error)}", file=sys.stderr)
        return UNREACHABLE


if __name__ == "__main__":
    sys.exit(main())
