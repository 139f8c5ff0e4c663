"""Training: known directions are found, the requested L0 is met, folding is exact, a restored run
is the same run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from featureflow.errors import UserError
from sae.architectures import (
    AnyArchitecture,
    BatchTopK,
    GatedL1,
    JumpRelu,
    MatryoshkaBatchTopK,
    ReluL1,
    TopK,
)
from sae.batches import Batch, InMemoryBatches
from sae.checkpoint import read_checkpoint, write_checkpoint
from sae.dictionary import Sae
from sae.normalisation import Normalisation, fold, normalisation_of_rows, unfold
from sae.optimizer import Adam
from sae.schedule import Schedule, schedule_of
from sae.step import Situation
from sae.trainer import Trainer, random_start, train
from tests.sae.planted import planted, share_recovered

ARCHITECTURES: list[AnyArchitecture] = [
    TopK(k=4),
    BatchTopK(k=4),
    MatryoshkaBatchTopK(k=4, fractions=(0.25, 0.75)),
    JumpRelu(target_l0=4),
    JumpRelu(target_l0=4, sparsity="tanh"),
    ReluL1(target_l0=4),
    GatedL1(target_l0=4),
]


def _name(architecture: AnyArchitecture) -> str:
    return f"{architecture.kind}_{getattr(architecture, 'sparsity', '')}".rstrip("_")


def _trainer(
    architecture: AnyArchitecture, x: Tensor, *, steps: int, n_latents: int, rate: float = 2e-3
) -> Trainer:
    return Trainer(
        architecture=architecture,
        schedule=schedule_of(steps=steps, learning_rate=rate, batch_size=256, record_every=50),
        weights=architecture.prepared(random_start(n_latents, x.shape[1], seed=0)),
        source=normalisation_of_rows(x),
    )


def _trained(architecture: AnyArchitecture, x: Tensor, *, steps: int, n_latents: int) -> Sae:
    trainer = _trainer(architecture, x[:-2000], steps=steps, n_latents=n_latents)
    train(trainer, InMemoryBatches(x[:-2000], batch_size=256, seed=0))
    return trainer.finish(Batch(x=x[-2000:]), {})


RECOVERERS = [TopK(k=4), BatchTopK(k=4), JumpRelu(target_l0=4)]


@pytest.mark.parametrize("architecture", RECOVERERS, ids=_name)
def test_planted_directions_are_recovered(architecture: AnyArchitecture) -> None:
    data = planted(n_directions=48, d=32, n_active=3, n_rows=14_000)
    start = random_start(96, 32, seed=0)["W_dec"]
    sae = _trained(architecture, data.x, steps=1000, n_latents=96)
    assert share_recovered(start, data.directions) == 0
    assert share_recovered(sae.W_dec, data.directions) >= 0.95


@pytest.mark.parametrize("architecture", RECOVERERS, ids=_name)
def test_directions_that_the_data_cannot_tell_apart_are_not_recovered(
    architecture: AnyArchitecture,
) -> None:
    """Pairs that are always active together: only their sum can be found, so the test above can
    fail."""
    data = planted(n_directions=48, d=32, n_active=6, n_rows=14_000, inseparable=True)
    sae = _trained(architecture, data.x, steps=1000, n_latents=96)
    sums = torch.nn.functional.normalize(data.directions[::2] + data.directions[1::2])
    assert share_recovered(sae.W_dec, data.directions) < 0.1
    assert share_recovered(sae.W_dec, sums) >= 0.9


@pytest.mark.parametrize("architecture", RECOVERERS, ids=_name)
def test_directions_too_dense_to_be_identified_are_not_recovered(
    architecture: AnyArchitecture,
) -> None:
    """24 of 48 directions active in 32 dimensions."""
    data = planted(n_directions=48, d=32, n_active=24, n_rows=14_000)
    sae = _trained(architecture, data.x, steps=1000, n_latents=96)
    assert share_recovered(sae.W_dec, data.directions) < 0.1


@pytest.mark.parametrize("architecture", ARCHITECTURES[1:], ids=_name)
def test_the_requested_l0_is_met_on_held_out_rows(architecture: AnyArchitecture) -> None:
    x = planted(n_directions=48, d=32, n_active=3, n_rows=10_000).x
    sae = _trained(architecture, x, steps=150, n_latents=64)
    l0 = float((sae.encode(x[-2000:]) > 0).float().sum(1).mean())
    assert l0 == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("architecture", ARCHITECTURES[4:], ids=_name)
def test_a_closed_loop_steers_the_penalty_to_the_requested_l0(
    architecture: AnyArchitecture,
) -> None:
    x = planted(n_directions=48, d=32, n_active=4, n_rows=8_000).x
    trainer = _trainer(architecture, x, steps=1000, n_latents=64)
    train(trainer, InMemoryBatches(x, batch_size=128, seed=0))
    assert trainer.l0_average == pytest.approx(4, rel=0.25)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=_name)
def test_a_restored_run_is_the_same_run(architecture: AnyArchitecture, tmp_path) -> None:
    x = planted(n_directions=48, d=32, n_active=3, n_rows=700).x
    whole, batches = (
        _trainer(architecture, x, steps=23, n_latents=64),
        InMemoryBatches(x, batch_size=128, seed=3),
    )
    train(whole, batches)
    part, batches = (
        _trainer(architecture, x, steps=23, n_latents=64),
        InMemoryBatches(x, batch_size=128, seed=3),
    )
    while not part.finished:
        part.train_on(batches.next_batch())
        if part.step in (1, 5, 6, 17):
            tensors, numbers = part.state()
            write_checkpoint(
                tmp_path / "one", tensors, {"trainer": numbers, "batches": batches.state()}
            )
            tensors, state = read_checkpoint(tmp_path / "one")
            part, batches = (
                _trainer(architecture, x, steps=23, n_latents=64),
                InMemoryBatches(x, batch_size=128, seed=3),
            )
            part.restore(tensors, state["trainer"])
            batches.restore(state["batches"])
    assert part.records == whole.records
    for name, weight in whole.weights.items():
        assert torch.equal(part.weights[name], weight), name


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=_name)
@pytest.mark.parametrize("transcoder", [False, True])
def test_folding_gives_the_same_function_of_raw_activations(
    architecture: AnyArchitecture, transcoder: bool
) -> None:
    generator = torch.Generator().manual_seed(4)
    source = Normalisation(mean=torch.randn(12, generator=generator) * 5, scale=3.0)
    target = (
        Normalisation(mean=torch.randn(7, generator=generator), scale=0.2) if transcoder else None
    )
    weights = random_start(24, 12, seed=1, d_out=7 if transcoder else None, skip=transcoder)
    weights = weights | architecture.extra_parameters(24)
    weights = {
        name: w + 0.1 * torch.randn(w.shape, generator=generator).abs()
        for name, w in weights.items()
    }
    if architecture.unit_decoder:
        weights["W_dec"] = torch.nn.functional.normalize(weights["W_dec"])
    sae = fold(weights, architecture.activation(weights, 0.3), source, target, {})
    x = torch.randn(50, 12, generator=generator) * 3
    inner = source.apply(x)
    pre = (inner - weights["b_dec"] if not transcoder else inner) @ weights["W_enc"].T + weights[
        "b_enc"
    ]
    z = _by_definition(architecture, weights, pre)
    out = (
        z @ weights["W_dec"] + weights["b_dec"] + (inner @ weights["W_skip"].T if transcoder else 0)
    )
    outer = target or source
    torch.testing.assert_close(sae(x), out * outer.scale + outer.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        sae.encode(x), z * outer.scale * weights["W_dec"].norm(dim=1), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(24))
    if architecture.kind not in (
        "batch_topk",
        "matryoshka_batch_topk",
    ):  # their one threshold is no weight
        back = unfold(sae, source, target)
        again = fold(back, architecture.activation(back, 0.0), source, target, {})
        torch.testing.assert_close(again(x), sae(x), rtol=1e-4, atol=1e-4)


def _by_definition(
    architecture: AnyArchitecture, weights: dict[str, Tensor], pre: Tensor
) -> Tensor:
    match architecture.kind:
        case "topk":
            return pre.relu() * torch.zeros_like(pre).scatter_(1, pre.topk(4, dim=1).indices, 1.0)
        case "batch_topk" | "matryoshka_batch_topk":
            return pre * (pre > 0.3)
        case "jump_relu":
            return pre * (pre > weights["theta"])
        case "gated":
            return (pre > 0) * (weights["log_gain"].exp() * pre + weights["magnitude_bias"]).relu()
        case _:
            return pre.relu()


def test_the_update_is_adam_with_clipping_projection_and_unit_rows() -> None:
    """Against torch.optim.Adam fed with gradients that were projected and clipped in the open."""
    generator = torch.Generator().manual_seed(0)
    ours = random_start(600, 8, seed=2)
    theirs = {name: weight.clone().requires_grad_() for name, weight in ours.items()}
    adam = Adam(ours, beta1=0.8, beta2=0.97)
    oracle = torch.optim.Adam(theirs.values(), lr=1e-2, betas=(0.8, 0.97), eps=6.25e-10)
    for scale in (1e-3, 5.0, 0.1, 1.0):
        gradients = {
            name: scale * torch.randn(weight.shape, generator=generator)
            for name, weight in ours.items()
        }
        for name, leaf in theirs.items():
            leaf.grad = gradients[name].clone()
        row = theirs["W_dec"].detach()
        theirs["W_dec"].grad -= (theirs["W_dec"].grad * row).sum(1, keepdim=True) * row
        norm = torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        oracle.step()
        with torch.no_grad():
            theirs["W_dec"] /= theirs["W_dec"].norm(dim=1, keepdim=True)
        found = adam.update(ours, gradients, learning_rate=1e-2, clip_norm=1.0, unit_decoder=True)
        assert found == pytest.approx(float(norm), rel=1e-4)
        for name, leaf in theirs.items():
            torch.testing.assert_close(ours[name], leaf.detach(), rtol=1e-4, atol=1e-6, msg=name)


def test_a_batch_with_nan_names_its_rows_and_changes_nothing() -> None:
    x = planted(n_directions=8, d=8, n_active=2, n_rows=64).x
    trainer = _trainer(TopK(k=2), x, steps=5, n_latents=16)
    before = {name: weight.clone() for name, weight in trainer.weights.items()}
    x[17, 3] = float("nan")
    with pytest.raises(UserError, match="NaN") as caught:
        batches = InMemoryBatches(x, batch_size=64, seed=0)
        trainer.train_on(batches.next_batch(), batches)
    assert "row 17" in str(caught.value)
    assert all(torch.equal(trainer.weights[name], weight) for name, weight in before.items())


def test_batches_visit_every_row_once_an_epoch() -> None:
    batches = InMemoryBatches(torch.arange(20.0)[:, None], batch_size=5, seed=1)
    epochs = [
        torch.cat([batches.next_batch().x for _ in range(4)]).flatten().tolist() for _ in range(2)
    ]
    assert [sorted(epoch) for epoch in epochs] == [list(range(20))] * 2
    assert epochs[0] != epochs[1]


def test_the_schedule_warms_up_holds_and_ends_near_zero() -> None:
    schedule = Schedule(steps=100, learning_rate=1.0, warmup_steps=10, decay_fraction=0.2)
    rates = [schedule.rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert set(rates[10:81]) == {1.0}
    assert rates[81:] == pytest.approx([1 - 0.05 * n for n in range(1, 20)])


def test_a_schedule_follows_the_length_of_its_run() -> None:
    """Worked by hand: a thirtieth of 3,000 steps is a memory of 100, a fiftieth of 3,000 steps of 8
    tokens 480."""
    long = schedule_of(steps=3000, learning_rate=1.0, batch_size=8)
    assert (long.beta2, long.dead_after, long.warmup_steps) == (pytest.approx(0.99), 480, 50)
    short = schedule_of(steps=60, learning_rate=1.0, batch_size=8)
    assert (short.beta2, short.dead_after, short.warmup_steps) == (
        pytest.approx(1 - 1 / 30),
        80,
        30,
    )
    endless = schedule_of(steps=10**6, learning_rate=1.0, batch_size=2048)
    assert (endless.beta2, endless.dead_after) == (pytest.approx(0.999), 10_000_000)


def test_training_uses_the_memories_of_its_schedule() -> None:
    """One step of Adam from zero moves every weight by the rate; what differs shows at the second
    step."""
    x = planted(n_directions=8, d=8, n_active=2, n_rows=64).x
    ends = []
    for memories in ({}, {"beta1": 0.9}, {"beta2": 0.9}):
        trainer = _trainer(TopK(k=2), x, steps=5, n_latents=16)
        trainer = Trainer(
            architecture=trainer.architecture,
            schedule=replace(trainer.schedule, **memories),
            weights=trainer.weights,
            source=trainer.source,
        )
        train(trainer, InMemoryBatches(x, batch_size=32, seed=0))
        ends.append(trainer.weights["W_enc"])
    assert not torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_jump_relu_thresholds_get_the_rectangle_gradient() -> None:
    """Worked by hand: one latent, one token inside the rectangle. z = pre, so ∂loss/∂θ = −(∂loss/∂z
    · pre) / width."""
    weights = {
        "W_enc": torch.tensor([[1.0, 0.0]]),
        "b_enc": torch.zeros(1),
        "W_dec": torch.tensor([[1.0, 0.0]]),
        "b_dec": torch.zeros(2),
        "theta": torch.tensor([0.95]),
    }
    architecture = JumpRelu(target_l0=1, penalty=1e-9, bandwidth=0.2)
    now = Situation(progress=0.0, dead=torch.zeros(1, dtype=torch.bool))
    seen = architecture.gradients(weights, torch.tensor([[1.0, 2.0]]), None, now)
    assert float(seen.gradients["theta"]) == pytest.approx(
        0.0, abs=1e-6
    )  # the reconstruction is exact along the row
    seen = architecture.gradients(
        weights | {"W_dec": torch.tensor([[0.0, 1.0]])}, torch.tensor([[1.0, 2.0]]), None, now
    )
    # error = (−1, 1 − 2); ∂(mean of squares)/∂z = 2 · (1 − 2) / 2 = −1; times pre = 1, over −0.2
    assert float(seen.gradients["theta"]) == pytest.approx(5.0, rel=1e-5)
