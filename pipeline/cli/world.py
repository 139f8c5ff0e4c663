"""`featureflow world`: worlds whose truth is known, and the score of a run of one."""

from __future__ import annotations

from pathlib import Path

import click

from data.model.spec import OfWorld
from data.worlds import World
from data.worlds.training import legal_share, train
from data.worlds.weights import save_weights
from featureflow.errors import Problem, UserError
from pipeline.cli.lens import lens_commands
from pipeline.cli.options import PATH, quiet_option
from pipeline.console import progress_bars, say
from pipeline.stages.recipe import value_of

SCORE = "world-score"


class _Worlds(click.Group):
    """`score` is the lens of that name, imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), "score"]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name == "score":
            return lens_commands.get_command(ctx, SCORE)
        return super().get_command(ctx, name)


@click.group("world", cls=_Worlds, no_args_is_help=True)
def world_commands() -> None:
    """Worlds whose truth is known: train their models, score the runs of them (docs/worlds.md)."""


@world_commands.command("train")
@click.argument("name")
@click.option("--out", type=PATH, help="[default: NAME.safetensors]")
@click.option("--steps", default=1500, help="batches of 128 contexts")
@quiet_option
def train_world(name: str, out: Path | None, steps: int, quiet: bool) -> None:
    """Train the model of a world and write its weights.

    NAME is the world's, or a TOML table such as '{kind = "fsm", surface = "random"}'.
    """
    world = _world(name)
    if not world.TRAINED:
        raise UserError(f"the weights of the world {world.kind} are written by hand")
    with progress_bars(quiet=quiet) as progress:
        model = train(world, steps=steps, progress=progress)
    share = legal_share(model, world)
    path = out or Path(f"{world.kind}.safetensors")
    save_weights(model, world, path, note=f"featureflow world train {name!r} --steps {steps}")
    say(f"{path}: {share:.1%} of the continuations that it finds likeliest are legal")


def _world(text: str) -> World:
    """Raises UserError with all that is wrong."""
    problems: list[Problem] = []
    spec = OfWorld.read({"world": value_of(text)}, "NAME", problems)
    if spec is None:
        raise UserError("there is no such world", problems=tuple(problems))
    return spec.world
