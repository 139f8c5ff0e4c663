"""The command `featureflow`: stages, the whole run, and the tools around stores, flow graphs,
atlases and plans.

    featureflow run --recipe laptop            the whole pipeline; what is up to date is left alone
    featureflow train --recipe laptop --train.steps 500      one stage, with one field of the recipe
    changed
    featureflow flow show L12/402              a feature's flow, in the terminal

Every field of every stage is explained by `featureflow <stage> --help`. Errors a user can fix are
printed without a traceback (`--debug` shows it) and the exit code is not zero.
"""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType

import click

from featureflow.errors import UserError
from pipeline.cli.atlas import ATLAS_TOOLS
from pipeline.cli.atlas_questions import QUESTIONS
from pipeline.cli.dictionaries import sae_commands
from pipeline.cli.flow import flow_commands
from pipeline.cli.lens import lens_commands, paper_commands
from pipeline.cli.options import Given, as_typed
from pipeline.cli.stage_commands import recipes, run, stage_command
from pipeline.cli.steer import STEER_TOOLS, serve
from pipeline.cli.store import store_commands
from pipeline.cli.trace import trace
from pipeline.cli.verify import verify
from pipeline.cli.world import world_commands
from pipeline.console import complain, use_any_console
from pipeline.stages import ALSO, STAGES


@click.group(no_args_is_help=True)
@click.version_option(package_name="featureflow")
def app() -> None:
    """Find the features inside a language model, follow them from layer to layer, steer along their
    flow."""


_TOOLS = {"atlas": (*QUESTIONS, *ATLAS_TOOLS), "steer": STEER_TOOLS}
_STAGE_COMMANDS = [stage_command(stage, _TOOLS.get(stage, ())) for stage in (*STAGES, *ALSO)]
_OTHERS = (
    verify,
    recipes,
    serve,
    trace,
    store_commands,
    flow_commands,
    lens_commands,
    paper_commands,
    sae_commands,
    world_commands,
)
for _command in (run, *_STAGE_COMMANDS, *_OTHERS):
    app.add_command(_command)


def main() -> None:
    """Entry point: run the command line and turn every failure into an exit code and a readable
    message."""
    signal.signal(signal.SIGTERM, _interrupt)
    use_any_console()
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    sys.exit(run_command(arguments, debug=debug))


def run_command(arguments: Sequence[str], *, debug: bool = False) -> int:
    """Run one command line in this process; returns the exit code and never raises."""
    given = Given()
    try:
        code = app(list(arguments), "featureflow", standalone_mode=False, obj=given)
        return int(code or 0)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except UserError as error:
        error.fix = as_typed(error.fix, given)
        _explain(error, f"error: {error}", debug)
        return 2
    except (KeyboardInterrupt, click.Abort):
        complain("interrupted; nothing is lost: run the same command again to go on")
        return 130
    except OSError as error:
        _explain(error, f"error: {error.strerror or error}: {error.filename or ''}", debug)
        return 3
    except MemoryError as error:
        _explain(
            error, "error: out of memory; use a smaller --train.batch_size or fewer sites", debug
        )
        return 3
    except Exception as error:
        _explain(
            error,
            f"internal error: {type(error).__name__}: {error}\n    run again with --debug for the "
            "traceback",
            debug,
        )
        return 1


def _explain(error: BaseException, message: str, debug: bool) -> None:
    if debug:
        complain("".join(traceback.format_exception(error)))
    complain(message)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
