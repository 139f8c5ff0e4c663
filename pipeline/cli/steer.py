"""`featureflow steer …` and `featureflow serve`: make plans, generate with them, export them, answer requests."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.cli.options import artifacts_option, recipe_option
from pipeline.console import say, show_number

_device = click.option("--device", default="cpu", show_default=True, help="torch device of the model")


@click.command()
@click.argument("feature")
@click.option("--along", type=click.Choice(["flow", "layer"]), default="flow", show_default=True, help="where to push")
@click.option("--dose", default=0.3, show_default=True, help="nats of KL to the unsteered model on neutral text")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="plan to write: .toml, .json or .safetensors"
)
@_device
@recipe_option
@artifacts_option
def plan(feature: str, along: str, dose: float, out: Path, device: str, recipe: str, artifacts: Path) -> None:
    """Make a plan that amplifies FEATURE along its flow, at the strength that gives the dose."""
    from pipeline.steer_session import SteerSession
    from steering.plan_files import write_plan

    session = SteerSession.open(artifacts / Path(recipe).stem, device=device)
    made = session.plan_along_flow(feature, along=along, dose=dose)
    say(
        f"{write_plan(made, out)}: {len(made.nodes)} nodes, strength {made.strength:.4g}, dose {show_number(made.dose)}"
    )


@click.command()
@click.argument("plan_path", type=click.Path(path_type=Path))
@click.option("--prompt", default="I think", show_default=True, help="text to continue")
@click.option("-n", "n_samples", default=3, show_default=True, help="samples, each steered and unsteered")
@click.option("--tokens", default=40, show_default=True, help="new tokens a sample")
@click.option("--temperature", default=0.8, show_default=True, help="of sampling; 0 takes the likeliest token")
@click.option("--seed", default=0, show_default=True, help="of sampling; shared by both of a pair")
@_device
@recipe_option
@artifacts_option
def generate(
    plan_path: Path,
    prompt: str,
    n_samples: int,
    tokens: int,
    temperature: float,
    seed: int,
    device: str,
    recipe: str,
    artifacts: Path,
) -> None:
    """Continue a prompt with and without the plan, from the same random numbers."""
    from pipeline.steer_session import SteerSession
    from steering.plan_files import read_plan

    session = SteerSession.open(artifacts / Path(recipe).stem, device=device)
    samples = session.sample(
        prompt,
        [None, read_plan(plan_path)],
        n_samples=n_samples,
        n_new_tokens=tokens,
        temperature=temperature,
        seed=seed,
    )
    for number in range(n_samples):
        for sample in (s for s in samples if s.sample == number):
            say(f"[{number} {'unsteered' if sample.plan == 0 else 'steered  '}] {prompt}{sample.text}")


@click.command()
@click.argument("plan_path", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@_device
@recipe_option
@artifacts_option
def export(plan_path: Path, out: Path, device: str, recipe: str, artifacts: Path) -> None:
    """Write a plan's vectors to OUT: .gguf (a control vector) or .safetensors; refused if its edit has none."""
    from pipeline.steer_session import SteerSession
    from steering.exports import write_gguf, write_vectors
    from steering.plan_files import read_plan

    session = SteerSession.open(artifacts / Path(recipe).stem, device=device)
    made = read_plan(plan_path)
    if out.suffix == ".gguf":
        write_gguf(made, session.saes, out, model_type=session.model.hf.config.model_type)
    else:
        write_vectors(made, session.saes, out)
    say(str(out))


@click.command()
@click.option(
    "--plan", "plan_paths", multiple=True, type=click.Path(path_type=Path), help="plan to offer by its file name"
)
@click.option("--host", default="127.0.0.1", show_default=True, help="address to listen on")
@click.option("--port", default=8089, show_default=True, help="port; 0 takes a free one")
@click.option("--token", default="", help="token that requests must carry; needed for any address but this machine")
@_device
@recipe_option
@artifacts_option
def serve(
    plan_paths: tuple[Path, ...], host: str, port: int, token: str, device: str, recipe: str, artifacts: Path
) -> None:
    """Answer OpenAI-style completion requests with the recipe's model; a request names a plan to be steered by it."""
    from pipeline.steer_session import SteerSession
    from steering.plan_files import read_plan
    from steering.serve import Endpoint, make_server

    if host not in ("127.0.0.1", "localhost", "::1") and not token:
        raise click.UsageError("--token is needed to listen on an address that others can reach")
    session = SteerSession.open(artifacts / Path(recipe).stem, device=device)
    plans = {path.stem: read_plan(path) for path in plan_paths}
    server = make_server(
        Endpoint(model=session.model, saes=session.saes, plans=plans, token=token), host=host, port=port
    )
    say(f"listening on http://{host}:{server.server_address[1]}/v1; plans: {', '.join(plans) or 'none'}")
    try:
        server.serve_forever()
    finally:
        server.server_close()


@click.command()
@click.option("--topics", type=click.IntRange(1), default=4, show_default=True, help="how many of the bundled topics")
@click.option("--seeds", default=10, show_default=True, help="features a topic whose flows are deactivated")
@click.option("--texts", default=24, show_default=True, help="topical and as many other texts a topic")
@click.option("--layers", default=6, show_default=True, help="layers that single and cumulative modes stop at")
@click.option("--out", type=click.Path(path_type=Path), help="folder; default: <recipe>/steer-paper")
@_device
@recipe_option
@artifacts_option
def paper(
    topics: int, seeds: int, texts: int, layers: int, out: Path | None, device: str, recipe: str, artifacts: Path
) -> None:
    """Rerun Feature Flow's steering experiments, with controls: tables, figures and a text in <recipe>/steer-paper."""
    from data.concepts.topics import read_topics
    from pipeline.console import progress_bars
    from pipeline.steer_session import SteerSession
    from steering.paper_report import write_paper_report
    from steering.paper_runs import Paper, PaperOptions, neutral_text, run_paper
    from steering.study_bench import Bench
    from steering.study_options import StudyOptions

    folder = artifacts / Path(recipe).stem
    session = SteerSession.open(folder, device=device)
    chosen = tuple(read_topics())[:topics]
    bench = Bench(world=session.world(), options=StudyOptions(topics=chosen, n_texts=texts))
    with progress_bars(quiet=False) as progress:
        subject = Paper(
            bench=bench,
            neutral=neutral_text(session.model),
            options=PaperOptions(n_seeds=seeds, n_layers=layers),
            progress=progress,
        )
        for found in run_paper(subject, chosen):
            path = write_paper_report(*found, out or folder / "steer-paper")
    say(path.read_text(encoding="utf-8"))
    say(str(path.parent))


STEER_TOOLS = (plan, generate, export, paper)
