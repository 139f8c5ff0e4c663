"""`featureflow steer generate | judge`: text with and without a plan, and a language model's
opinion of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipeline.cli.options import artifacts_option, recipe_option, run_folder
from pipeline.cli.steer_plans import device_option, opened
from pipeline.console import say


@click.command()
@click.argument("plan_path", type=click.Path(path_type=Path))
@click.option("--prompt", default="I think", show_default=True, help="text to continue")
@click.option(
    "-n", "n_samples", default=3, show_default=True, help="samples, each steered and unsteered"
)
@click.option("--tokens", default=40, show_default=True, help="new tokens a sample")
@click.option(
    "--temperature", default=0.8, show_default=True, help="of sampling; 0 takes the likeliest token"
)
@click.option("--seed", default=0, show_default=True, help="of sampling; shared by both of a pair")
@click.option(
    "--log-probs",
    is_flag=True,
    help="show every token with its log-probability under the model that wrote it",
)
@click.option("--stream", "streams", is_flag=True, help="one steered text, shown as it is written")
@device_option
@recipe_option
@artifacts_option
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
    recipe: str,
    artifacts: Path,
) -> None:
    """Continue a prompt with and without the plan, from the same random numbers."""
    from steering.generation import Sampling, generate

    steering = opened(artifacts, recipe, device).steering
    plan = steering.read_plan(plan_path)
    sampling = Sampling(n_tokens=tokens, temperature=temperature)
    if streams:
        _stream(steering, plan, prompt, sampling, seed)
        return
    made = generate(
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
    from steering.generation import stream

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
@click.option(
    "--key-file",
    type=click.Path(path_type=Path, exists=True),
    help="file with the key that it asks for",
)
@click.option(
    "--rubric", type=click.Choice(["axbench", "sae-ts"]), default="axbench", show_default=True
)
@click.option(
    "-n", "n_texts", default=24, show_default=True, help="pairs of texts, drawn by the seed"
)
@click.option(
    "--arm", default="flow", show_default=True, help="way of steering whose texts are judged"
)
@click.option("--seed", default=0, show_default=True, help="of the draw")
@click.option(
    "--max-tokens",
    default=16,
    show_default=True,
    type=click.IntRange(1),
    help="of an answer; more for a model that reasons first",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="table of verdicts to write, .parquet",
)
@recipe_option
@artifacts_option
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
    recipe: str,
    artifacts: Path,
) -> None:
    """Let a language model rate what the steer stage wrote at its headline dose, steered and
    unsteered."""
    from pipeline.console import progress_bars
    from pipeline.describe.chat import ChatModel
    from pipeline.lenses.steering.blind_pairs import judge_artifact, verdict_lines
    from pipeline.lenses.steering.judge import Judge

    key = "" if key_file is None else key_file.read_text(encoding="utf-8").strip()
    with progress_bars(quiet=False) as progress:
        table = judge_artifact(
            run_folder(artifacts, recipe) / "steer",
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
