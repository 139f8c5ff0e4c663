"""The command `featureflow`: stages, the whole run, and the tools around stores, flow graphs,
atlases and plans.

    featureflow run --recipe laptop            the whole pipeline; what is up to date is left alone
    featureflow train --recipe laptop --train.steps 500      one stage, with one field of the recipe
    changed
    featureflow flow show L12/402              a feature's flow, in the terminal

Every field of every stage is explained by `featureflow <stage> --help`. Errors a user can fix are
printed without a traceback (`--debug` shows it) and the exit code is not zero. The module of a
command, and with it torch, is imported when the command is asked for.
"""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Sequence
from pkgutil import resolve_name
from types import FrameType

import click

from featureflow.errors import UserError
from pipeline.cli.given import Given, as_typed
from pipeline.console import complain, say, table, use_any_console
from pipeline.stages import ALSO, STAGES, TITLES
from pipeline.stages.recipe import description_of, known_recipes

_COMMANDS = {
    "run": ("stage_commands:run", "Run the pipeline of a recipe: every stage not up to date."),
    **{
        stage: ("stage_commands:stage_command", f"{TITLES[stage].capitalize()}.")
        for stage in (*STAGES, *ALSO)
    },
    "verify": ("verify:verify", "Check a finished run: every file, and that all belong together."),
    "serve": ("serving:serve", "Answer OpenAI-style requests with the recipe's model, steered."),
    "trace": ("trace:trace", "Say which features made the model go on with its next token."),
    "store": ("store:store_commands", "Look into an activation store, verify it, import one."),
    "flow": ("flow:flow_commands", "Ask the flow graph: show a feature, draw it, export."),
    "lens": ("lens:lens_commands", "Look at a run through a lens: tables, a figure and a text."),
    "paper": ("lens:paper_commands", "Rerun an experiment of the papers on a linked model."),
    "sae": ("dictionaries:sae_commands", "Check and convert dictionaries in other tools' formats."),
    "finetune": ("finetune:finetune_command", "Make a second model to compare with (lens shift)."),
    "world": ("world:world_commands", "Worlds whose truth is known: train models, score runs."),
}
"""Where each command is, below this package, and a line about it."""
_COMMANDS |= {stage: (f"{stage}:{stage}", _COMMANDS[stage][1]) for stage in ("steer", "atlas")}


class _LateCommands(click.Group):
    """Imports the module of a command when it is asked for, not for the list of all."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*_COMMANDS, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return super().get_command(ctx, name)
        found = resolve_name(f"pipeline.cli.{_COMMANDS[name][0]}")
        return found if isinstance(found, click.Command) else found(name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        own = [(name, command.get_short_help_str(80)) for name, command in self.commands.items()]
        with formatter.section("Commands"):
            formatter.write_dl([*((name, line) for name, (_, line) in _COMMANDS.items()), *own])


@click.group(cls=_LateCommands, no_args_is_help=True, context_settings={"show_default": True})
@click.version_option(package_name="featureflow")
def app() -> None:
    """Find the features inside a language model, follow them from layer to layer, steer along their
    flow."""


@app.command()
def recipes() -> None:
    """List the recipes that can be named."""
    found = sorted(known_recipes().items())
    for line in table([(name, description_of(path)) for name, path in found]):
        say(line)


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
