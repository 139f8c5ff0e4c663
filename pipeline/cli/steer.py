"""`featureflow steer`, and its tools: text with and without a plan, a language model's opinion of
it, plans for other programs. Those that make plans are in `steer_plans.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from featureflow.sites import parse_site
from pipeline.cli.lens import lens_commands
from pipeline.cli.options import PATH, THERE, device_option, of_a_run
from pipeline.cli.stage_commands import stage_command
from pipeline.cli.steer_plans import calibrate, contrast, design, plan, remove
from pipeline.console import progress_bars, say
from pipeline.context import RunContext
from pipeline.describe.chat import ChatModel
from pipeline.lenses.axbench import Config as AxBenchConfig
from pipeline.lenses.axbench import export as export_axbench
from pipeline.lenses.steering.blind_pairs import judge_artifact, verdict_lines
from pipeline.lenses.steering.judge import Judge
from pipeline.run import Run
from steering.exports import neuronpedia_request, write_gguf, write_vectors
from steering.generation import Sampling, stream
from steering.generation import generate as generated


@click.command()
@click.argument("plan_path", type=PATH)
@click.option("--prompt", default="I think", help="text to continue")
@click.option("-n", "n_samples", default=3, help="samples, each steered and unsteered")
@click.option("--tokens", default=40, help="new tokens a sample")
@click.option("--temperature", default=0.8, help="of sampling; 0 takes the likeliest token")
@click.option("--seed", default=0, help="of sampling; shared by both of a pair")
@click.option(
    "--log-probs",
    is_flag=True,
    help="show every token with its log-probability under the model that wrote it",
)
@click.option("--stream", "streams", is_flag=True, help="one steered text, shown as it is written")
@device_option
@of_a_run
def generate(
    plan_path: Path,
    prompt: str,
    n_samples: int,
    tokens: int,
    temperature: float,
    seed: int,
    log_probs: bool,
    streams: bool,
    device: str,
    folder: Path,
) -> None:
    """Continue a prompt with and without the plan, from the same random numbers."""
    steering = Run.open(folder, context=RunContext(device=device)).steering
    plan = steering.read_plan(plan_path)
    sampling = Sampling(n_tokens=tokens, temperature=temperature)
    if streams:
        _stream(steering, plan, prompt, sampling, seed)
        return
    made = generated(
        steering.model,
        steering.saes,
        [prompt],
        [None, plan],
        n_samples=n_samples,
        seed=seed,
        sampling=sampling,
    )
    for number in range(n_samples):
        for sample in (s for s in made.samples if s.sample == number):
            say(
                f"[{number} {'unsteered' if sample.plan == 0 else 'steered  '}] "
                f"{prompt}{sample.text}"
            )
            if log_probs:
                decode = steering.model.tokenizer.decode
                pairs = zip(sample.ids, sample.log_probs, strict=True)
                say("  " + " ".join(f"{decode([i])!r}:{value:.2f}" for i, value in pairs))
    _tell_touched(made.reports)


def _stream(steering: Any, plan: Any, prompt: str, sampling: Any, seed: int) -> None:
    reports: list[Any] = []
    ids: list[int] = []
    sent = 0
    click.echo(prompt, nl=False)
    for step in stream(
        steering.model, steering.saes, prompt, [plan], seed=seed, sampling=sampling, reports=reports
    ):
        ids += step.ids
        text = steering.model.tokenizer.decode(ids)
        if not text.endswith("\ufffd"):
            click.echo(text[sent:], nl=False)
            sent = len(text)
    click.echo()
    _tell_touched(reports)


def _tell_touched(reports: Any) -> None:
    nodes = [node for report in reports for node in report.nodes]
    seen, touched = sum(node.n_seen for node in nodes), sum(node.n_touched for node in nodes)
    say(f"steering changed {touched} of {seen} activations in its scope")


@click.command()
@click.option(
    "--url",
    required=True,
    help="address of a chat endpoint up to /v1, such as http://127.0.0.1:8089/v1",
)
@click.option("--model", required=True, help="name of the judging model there")
@click.option("--key-file", type=THERE, help="file with the key that it asks for")
@click.option("--rubric", type=click.Choice(["axbench", "sae-ts"]), default="axbench")
@click.option("-n", "n_texts", default=24, help="pairs of texts, drawn by the seed")
@click.option("--arm", default="flow", help="way of steering whose texts are judged")
@click.option("--seed", default=0, help="of the draw")
@click.option(
    "--max-tokens",
    default=16,
    type=click.IntRange(1),
    help="of an answer; more for a model that reasons first",
)
@click.option("--out", type=PATH, required=True, help="table of verdicts to write, .parquet")
@of_a_run
def judge(
    url: str,
    model: str,
    key_file: Path | None,
    rubric: str,
    n_texts: int,
    arm: str,
    seed: int,
    max_tokens: int,
    out: Path,
    folder: Path,
) -> None:
    """Let a language model rate what the steer stage wrote at its headline dose, steered and
    unsteered."""
    key = "" if key_file is None else key_file.read_text(encoding="utf-8").strip()
    with progress_bars(quiet=False) as progress:
        table = judge_artifact(
            folder / "steer",
            Judge(chat=ChatModel(url=url, model=model, key=key), max_tokens=max_tokens),
            rubric,
            arm=arm,
            n_pairs=n_texts,
            seed=seed,
            progress=progress,
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(out, index=False)
    for line in verdict_lines(table, rubric):
        say(line)
    say(str(out))


@click.command()
@click.argument("plan_path", type=PATH)
@click.argument("out", type=PATH)
@click.option("--model-id", help="for .json: what Neuronpedia calls the model")
@click.option(
    "--source",
    "sources",
    multiple=True,
    help="for .json: Neuronpedia's name of a site's dictionary, L12=12-res-jb",
)
@click.option("--prompt", default="I think", help="for .json: text to continue")
@device_option
@of_a_run
def export(
    plan_path: Path,
    out: Path,
    model_id: str | None,
    sources: tuple[str, ...],
    prompt: str,
    device: str,
    folder: Path,
) -> None:
    """Write a plan for other programs to OUT: .gguf (a control vector), .safetensors (vectors) or
    .json (the body of a Neuronpedia steering request). Refused, with the reason, where the plan
    cannot be expressed there."""
    if out.suffix not in (".gguf", ".safetensors", ".json"):
        raise click.UsageError(f"{out}: write .gguf, .safetensors or .json")
    if out.suffix == ".json" and model_id is None:
        raise click.UsageError("--model-id is needed to write a Neuronpedia request")
    steering = Run.open(folder, context=RunContext(device=device)).steering
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


@click.command()
@click.argument("site")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--model-id", help="how the model is called in AxBench's files; its name otherwise")
@device_option
@of_a_run
def axbench(site: str, out: Path, model_id: str | None, device: str, folder: Path) -> None:
    """Write the SAE of SITE (such as L20) to the folder OUT as AxBench reads it: a latent for each
    bundled topic, with training and evaluation data. The lens axbench detects the same topics
    here."""
    run = Run.open(folder, context=RunContext(device=device))
    name = model_id or run.model.name
    for path in export_axbench(run, parse_site(site), out, model_id=name, config=AxBenchConfig()):
        say(str(path))


def _sources(words: tuple[str, ...]) -> dict[Any, str]:
    pairs = [word.partition("=") for word in words]
    if bad := [
        word for word, (_, equals, name) in zip(words, pairs, strict=True) if not equals or not name
    ]:
        raise click.UsageError(
            f"--source takes SITE=NAME such as L12=12-res-jb, not {', '.join(bad)}"
        )
    return {parse_site(site): name for site, _, name in pairs}


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


steer = stage_command(
    "steer", (plan, design, remove, contrast, calibrate, generate, judge, export, axbench, paper)
)
