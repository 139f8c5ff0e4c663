"""`featureflow steer export | paper` and `featureflow serve`; the other tools of `steer` are in the
files beside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from pipeline.cli.lens import lens_commands
from pipeline.cli.options import artifacts_option, recipe_option
from pipeline.cli.serving import serve_until_interrupted
from pipeline.cli.steer_plans import (
    calibrate,
    contrast,
    design,
    device_option,
    opened,
    plan,
    remove,
)
from pipeline.cli.steer_texts import generate, judge
from pipeline.console import say


@click.command()
@click.argument("plan_path", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--model-id", help="for .json: what Neuronpedia calls the model")
@click.option(
    "--source",
    "sources",
    multiple=True,
    help="for .json: Neuronpedia's name of a site's dictionary, L12=12-res-jb",
)
@click.option("--prompt", default="I think", show_default=True, help="for .json: text to continue")
@device_option
@recipe_option
@artifacts_option
def export(
    plan_path: Path,
    out: Path,
    model_id: str | None,
    sources: tuple[str, ...],
    prompt: str,
    device: str,
    recipe: str,
    artifacts: Path,
) -> None:
    """Write a plan for other programs to OUT: .gguf (a control vector), .safetensors (vectors) or
    .json (the body of a Neuronpedia steering request). Refused, with the reason, where the plan
    cannot be expressed there."""
    from steering.exports import neuronpedia_request, write_gguf, write_vectors

    if out.suffix not in (".gguf", ".safetensors", ".json"):
        raise click.UsageError(f"{out}: write .gguf, .safetensors or .json")
    if out.suffix == ".json" and model_id is None:
        raise click.UsageError("--model-id is needed to write a Neuronpedia request")
    steering = opened(artifacts, recipe, device).steering
    made = steering.read_plan(plan_path)
    if out.suffix == ".gguf":
        write_gguf(made, steering.saes, out, model_type=steering.model.hf.config.model_type)
    elif out.suffix == ".safetensors":
        write_vectors(made, steering.saes, out)
    else:
        body = neuronpedia_request(
            made, model_id=str(model_id), sources=_sources(sources), prompt=prompt
        )
        out.write_text(json.dumps(body, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    say(str(out))


def _sources(words: tuple[str, ...]) -> dict[Any, str]:
    from featureflow.sites import parse_site

    pairs = [word.partition("=") for word in words]
    if bad := [
        word for word, (_, equals, name) in zip(words, pairs, strict=True) if not equals or not name
    ]:
        raise click.UsageError(
            f"--source takes SITE=NAME such as L12=12-res-jb, not {', '.join(bad)}"
        )
    return {parse_site(site): name for site, _, name in pairs}


@click.command()
@click.option(
    "--plan",
    "plan_paths",
    multiple=True,
    type=click.Path(path_type=Path),
    help="plan to offer by its file name",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="address to listen on")
@click.option("--port", default=8089, show_default=True, help="port; 0 takes a free one")
@click.option(
    "--token",
    default="",
    help="token that requests must carry; needed for any address but this machine",
)
@device_option
@recipe_option
@artifacts_option
def serve(
    plan_paths: tuple[Path, ...],
    host: str,
    port: int,
    token: str,
    device: str,
    recipe: str,
    artifacts: Path,
) -> None:
    """Answer OpenAI-style completion requests with the recipe's model; a request names a plan to be
    steered by it."""
    from pipeline.serve.endpoint import Endpoint, make_server

    if host not in ("127.0.0.1", "localhost", "::1") and not token:
        raise click.UsageError("--token is needed to listen on an address that others can reach")
    if twice := sorted(
        {path.stem for path in plan_paths if sum(p.stem == path.stem for p in plan_paths) > 1}
    ):
        raise click.UsageError(f"two plans of one name: {', '.join(twice)}; rename a file")
    steering = opened(artifacts, recipe, device).steering
    plans = {path.stem: steering.read_plan(path) for path in plan_paths}
    server = make_server(
        Endpoint(
            model=steering.model,
            saes=steering.saes,
            plans=plans,
            token=token,
            check=steering.check_plan,
        ),
        host=host,
        port=port,
    )
    say(f"listening on {server.address}/v1; plans: {', '.join(plans) or 'none'}")
    serve_until_interrupted(server)


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    add_help_option=False,
)
@click.pass_context
def paper(ctx: click.Context) -> None:
    """Rerun Feature Flow's steering experiments, with controls: the lens steering-paper."""
    lens = lens_commands.get_command(ctx, "steering-paper")
    if lens is not None:
        lens.main(ctx.args, prog_name="featureflow steer paper", standalone_mode=False)


STEER_TOOLS = (plan, design, remove, contrast, calibrate, generate, judge, export, paper)
