"""dsnat-fleet: the program. Knows its verbs, and makes a sentence and an exit status of what ends one.

Exit status: 0 done or nothing to do, 1 failed, 2 invalid input or usage, 3 some gateways failed or were
not reached, 4 changes pending (`plan`, `drift`), 5 a gate stopped the roll-out, 6 reverted by the
gateway, 7 locked by another operator, 8 the plan is stale, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

import click

from provision.verbs import DONE, FAILED, INTERRUPTED, INVALID, Exit, describe, keys, look, maintain, push


class Cli(click.Group):
    def invoke(self, ctx: click.Context) -> object:
        """A reader that has gone away (`| head`) ends a verb without a word, and as failed: a push that could
        not show its plan has pushed nothing.
        """
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise Exit(FAILED) from error


@click.group(cls=Cli, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--file",
    type=click.Path(path_type=Path),
    default=Path("fleet.yaml"),
    show_default=True,
    help="The file that describes the fleet.",
)
@click.option("--debug", is_flag=True, help="Show a traceback for an internal error.")
@click.version_option("0.1.0", prog_name="dsnat-fleet")
@click.pass_context
def cli(context: click.Context, file: Path, debug: bool) -> None:
    """Gateways described in one file: checked, planned, pushed, and undone if they cut themselves off.

    \b
    Exit status: 0 done or nothing to do, 1 failed, 2 invalid input or usage, 3 some gateways failed
    or were not reached, 4 changes pending, 5 a gate stopped the roll-out, 6 reverted by the gateway,
    7 locked by another operator, 8 the plan is stale, 130 interrupted.
    """
    context.obj = {"file": file, "debug": debug}


# in the order of the work
for verb in (
    *(describe.validate, describe.render, push.plan, push.push, push.resume),
    *(maintain.confirm, maintain.rollback, maintain.drain, maintain.update),
    *(
        look.exec_,
        look.status,
        look.drift,
        look.history,
        keys.keys,
        describe.slices,
        describe.import_,
        describe.schema,
    ),
):
    cli.add_command(verb)


def end(status: int) -> NoReturn:
    """What the verb came to stands, also when nobody reads the last lines of it."""
    try:
        if sys.stdout:  # closed by who started us: there is none
            sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is tried again at exit
        if not isinstance(error, BrokenPipeError):
            print(f"dsnat-fleet: the output cannot be written ({error.strerror})", file=sys.stderr)
            status = status or FAILED
    sys.exit(status)


def main() -> NoReturn:
    """The one place where an exception becomes a sentence and an exit status."""
    debug = "--debug" in sys.argv
    try:
        status = cli.main(standalone_mode=False)
        end(status if isinstance(status, int) else DONE)
    except Exit as told:
        if str(told):
            print(f"dsnat-fleet: {told}", file=sys.stderr)
        end(told.status)
    except click.exceptions.Exit as told:
        end(told.exit_code)
    except click.ClickException as error:
        error.show()
        end(INVALID)
    except (KeyboardInterrupt, click.Abort):
        print("dsnat-fleet: interrupted; nothing was left armed", file=sys.stderr)
        end(INTERRUPTED)
    except Exception as error:
        from provision.load import InvalidFleet

        if isinstance(error, InvalidFleet):
            bad = sum(not problem.warning for problem in error.problems)
            print(f"{error}\ndsnat-fleet: {bad} error{'s' * (bad > 1)}; nothing was done", file=sys.stderr)
            end(INVALID)
        if debug:
            raise
        if isinstance(error, OSError):  # a full disk, a folder that is not ours: the machine's, not ours
            where = f"{error.filename}: " if error.filename else ""
            print(f"dsnat-fleet: {where}{error.strerror or error}", file=sys.stderr)
            end(FAILED)
        print(
            f"dsnat-fleet: internal error: {error!r}; run it with --debug for the whole story",
            file=sys.stderr,
        )
        end(FAILED)


if __name__ == "__main__":
    main()
