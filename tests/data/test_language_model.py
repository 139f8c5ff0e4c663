"""The language model: its sites hold what TransformerLens says they hold, edits act as written,
hooks never stay."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from data.model.bridge import boot_bridge
from data.model.fingerprint import same_weights
from data.model.language_model import LanguageModel, Packaged, Random
from data.model.module_sites import find_blocks, norm_gain
from data.model.sources import LoadedModel, attention_for, build_random
from featureflow.errors import UserError
from featureflow.sites import Site

SMALL = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
WIDER = SMALL | {"intermediate_size": 64, "max_position_embeddings": 64}
IDS_OF_SPECIAL = {"bos_token_id": 0, "eos_token_id": 0}


def random_llama() -> LanguageModel:
    return LanguageModel.open(Random(n_layers=3, seed=1), dtype="float32")


def _from_config(model_class: Any, config: Any) -> LanguageModel:
    config._attn_implementation = attention_for(config)
    hf = model_class(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in hf.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    tokenizer = build_random(Random()).tokenizer
    loaded = LoadedModel(hf=hf.eval().requires_grad_(False), tokenizer=tokenizer, folder=None)
    return LanguageModel(name=model_class.__name__, loaded=loaded)


BUILDERS: dict[str, Callable[[], LanguageModel]] = {
    "llama": random_llama,
    "gpt2": lambda: _from_config(
        GPT2LMHeadModel, GPT2Config(vocab_size=512, n_positions=64, n_embd=32, n_layer=3, n_head=4)
    ),
    "gemma2": lambda: _from_config(
        Gemma2ForCausalLM,
        Gemma2Config(
            **SMALL,
            intermediate_size=64,
            num_key_value_heads=2,
            head_dim=8,
            query_pre_attn_scalar=8,
            attn_logit_softcapping=0.5,  # low enough to matter with random weights
            sliding_window=4,
        ),
    ),
    "pythia": lambda: _from_config(GPTNeoXForCausalLM, GPTNeoXConfig(**WIDER)),
    # one dropout module serves both sublayers of a block: it is neither's output
    "phi": lambda: _from_config(
        PhiForCausalLM, PhiConfig(**WIDER, **IDS_OF_SPECIAL, pad_token_id=0)
    ),
    # the attention's output is added into the MLP's in place
    "falcon": lambda: _from_config(FalconForCausalLM, FalconConfig(**SMALL, **IDS_OF_SPECIAL)),
}


@pytest.fixture(params=BUILDERS, scope="module")
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return BUILDERS[request.param]()


@pytest.fixture(scope="module")
def llama() -> LanguageModel:
    return random_llama()


IDS = torch.tensor([[0, 5, 300, 17, 44, 90, 8], [0, 9, 9, 120, 301, 2, 1]])


def test_every_site_equals_what_transformer_bridge_reads_there(model: LanguageModel) -> None:
    bridge = boot_bridge(model)
    _, cache = bridge.run_with_cache(IDS)
    read = model.activations(IDS, model.sites())
    assert {site.kind for site in read} >= {"resid_pre", "attn_out", "mlp_out", "resid_post"}
    assert {site.kind for site in read} >= {"z", "mlp_in"}
    for site, value in read.items():
        assert value.shape[-1] == model.width(site)
        expected = cache[site.name].flatten(2)  # z is [batch, position, head, d_head] there
        torch.testing.assert_close(
            value, expected, atol=2e-5, rtol=1e-5, msg=lambda m, s=site: f"{s}: {m}"
        )


def test_edits_inside_the_sublayers_equal_the_edit_by_hand(model: LanguageModel) -> None:
    """z through the output projection, mlp_in through the MLP, mlp_normalized through the gain."""
    plain, block = model.activations(IDS, model.sites()), model.blocks[1]
    z, mlp_in, normalized = (Site(1, kind) for kind in ("z", "mlp_in", "mlp_normalized"))
    after = after_edit(model, {z: lambda x: 2 * x}, Site(1, "attn_out"))
    by_hand = block.z.module(2 * plain[z])
    if block.attention is not None and "norm" in type(block.attention).__name__.lower():
        by_hand = block.attention(by_hand)
    torch.testing.assert_close(after, by_hand, atol=1e-5, rtol=1e-5)
    after = after_edit(model, {mlp_in: lambda x: 2 * x}, Site(1, "mlp_out"))
    by_hand = block.mlp_reader(2 * plain[mlp_in])
    if block.mlp is not block.mlp_reader:
        by_hand = block.mlp(by_hand)
    torch.testing.assert_close(after, by_hand, atol=1e-5, rtol=1e-5)
    if normalized in model.sites():
        after = after_edit(model, {normalized: lambda x: x + 1}, mlp_in)
        gain = norm_gain(block.mlp_norm, model.d_model)
        torch.testing.assert_close(after, plain[mlp_in] + gain, atol=1e-4, rtol=1e-4)


def after_edit(model: LanguageModel, edits: Any, site: Site) -> torch.Tensor:
    with model.edited(edits):
        return model.activations(IDS, [site])[site]


class Blocks(torch.nn.Module):
    """Two lists of the right length before the blocks: one never runs, one runs beside them."""

    def __init__(self, hf: Any) -> None:
        super().__init__()
        n, width = hf.config.num_hidden_layers, hf.config.hidden_size
        self.unused = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(n))
        self.beside = torch.nn.ModuleList(torch.nn.Linear(width, 4) for _ in range(n))
        self.inner = hf.base_model

    def forward(self, ids: torch.Tensor) -> Any:
        embedded = self.inner.get_input_embeddings()(ids)
        for each in self.beside:
            each(embedded)
        return self.inner(ids, use_cache=False)


def test_the_blocks_are_those_that_ran_one_after_the_other(llama: LanguageModel) -> None:
    base = Blocks(llama.hf)
    found = find_blocks(base, llama.n_layers, lambda: base(IDS))
    assert all(a is b.block for a, b in zip(found, llama.blocks, strict=True))
    with pytest.raises(UserError, match="no list of blocks"):
        find_blocks(base.beside, llama.n_layers, lambda: base(IDS))


def test_a_stream_of_several_copies_is_named() -> None:
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    config = Gemma3nTextConfig(
        vocab_size=512,
        vocab_size_per_layer_input=512,
        hidden_size=32,
        hidden_size_per_layer_input=8,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_kv_shared_layers=0,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0, 0.0],
        layer_types=["sliding_attention", "full_attention"],
    )
    with pytest.raises(UserError, match="no single residual stream") as error:
        _from_config(Gemma3nForCausalLM, config)
    assert "4 streams" in str(error.value)


def random_rwkv() -> LanguageModel:
    from transformers import RwkvConfig, RwkvForCausalLM

    config = RwkvConfig(vocab_size=512, hidden_size=32, num_hidden_layers=2, context_length=64)
    return _from_config(RwkvForCausalLM, config)


def test_left_padding_changes_nothing_in_a_recurrent_model() -> None:
    """Its state runs over the padding whatever the mask says."""
    model = random_rwkv()
    assert model.reads_padding
    padded, mask = torch.cat([IDS, IDS], dim=1), torch.ones(2, 14, dtype=torch.long)
    mask[0, :7] = 0
    found = model.logits(padded, mask)
    torch.testing.assert_close(found[0, 7:], model.logits(IDS[:1])[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[1], model.logits(padded[1:])[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.logits(padded, mask, n_last=2), found[:, -2:])
    with pytest.raises(UserError, match="reads padding") as error:
        model.logits(padded, mask, cache=model.new_cache())
    assert "equal length" in str(error.value.fix)


def test_attention_heeds_its_mask(model: LanguageModel) -> None:
    assert not model.reads_padding


def test_sites_are_found_in_bfloat16_beside_a_massive_position(model: LanguageModel) -> None:
    """SmolLM2's first position has a norm a hundred times the others': rounding there must not hide
    the others."""
    hf = copy.deepcopy(model.hf)
    hf.get_input_embeddings().weight[0] *= 1000.0
    again = LanguageModel(
        name=model.name,
        loaded=LoadedModel(hf=hf.to(torch.bfloat16), tokenizer=model.tokenizer, folder=None),
    )
    names = [
        {id(module): name for name, module in each.hf.named_modules()} for each in (model, again)
    ]
    for expected, found in zip(model.blocks, again.blocks, strict=True):
        assert found.is_sequential == expected.is_sequential
        assert names[1][id(found.attention)] == names[0][id(expected.attention)]
        assert names[1][id(found.mlp)] == names[0][id(expected.mlp)]


def test_parallel_blocks_have_no_middle() -> None:
    kinds = {site.kind for site in BUILDERS["pythia"]().sites()}
    inside = {"z", "mlp_normalized", "mlp_in"}
    assert kinds == {"resid_pre", "attn_out", "mlp_out", "resid_post"} | inside
    shared = {site.kind for site in BUILDERS["falcon"]().sites()}
    assert shared == kinds - {"mlp_normalized"}  # one norm for attention and MLP


def test_the_stream_is_the_sum_of_what_is_written_to_it(model: LanguageModel) -> None:
    read = model.activations(IDS, model.sites())
    for layer in range(model.n_layers):
        written = read[Site(layer, "attn_out")] + read[Site(layer, "mlp_out")]
        torch.testing.assert_close(
            read[Site(layer, "resid_pre")] + written,
            read[Site(layer, "resid_post")],
            atol=1e-5,
            rtol=1e-5,
        )


def test_stopping_early_changes_nothing(model: LanguageModel) -> None:
    site = Site(0, "resid_post")
    assert torch.equal(
        model.activations(IDS, [site])[site], model.activations(IDS, model.sites())[site]
    )


def test_an_edit_anywhere_equals_the_edit_by_hand(model: LanguageModel) -> None:
    """Adding a vector at any site of block 1 must equal adding what it does to the stream: the same
    vector at resid_post for what is only added, and a full rerun for what the MLP or attention
    reads."""
    vector = torch.linspace(-1, 1, model.d_model)
    layer = 1
    plain = model.activations(IDS, model.sites())
    for kind in ("mlp_out", "resid_post"):
        with model.edited({Site(layer, kind): lambda x: x + vector}):
            after = model.activations(IDS, [Site(layer, "resid_post")])
        torch.testing.assert_close(
            after[Site(layer, "resid_post")],
            plain[Site(layer, "resid_post")] + vector,
            atol=1e-5,
            rtol=1e-5,
        )
    with model.edited({Site(layer, "resid_pre"): lambda x: x + vector}):
        at_pre = model.logits(IDS)
    with model.edited({Site(layer - 1, "resid_post"): lambda x: x + vector}):
        torch.testing.assert_close(model.logits(IDS), at_pre)


def test_an_edit_of_the_middle_reaches_mlp_and_skip_path(llama: LanguageModel) -> None:
    vector = torch.linspace(-1, 1, llama.d_model)
    middle, post = Site(1, "resid_mid"), Site(1, "resid_post")
    block = llama.hf.model.layers[1]
    stream = llama.activations(IDS, [middle])[middle] + vector
    expected = stream + block.mlp(block.post_attention_layernorm(stream))
    with llama.edited({middle: lambda x: x + vector}):
        torch.testing.assert_close(
            llama.activations(IDS, [post])[post], expected, atol=1e-5, rtol=1e-5
        )


def test_recorders_see_edits_whatever_the_order(llama: LanguageModel) -> None:
    site = Site(1, "resid_mid")
    plain = llama.activations(IDS, [site])[site]
    with llama.recorded([site, Site(1, "attn_out")]) as seen:
        with llama.edited({site: lambda x: 2 * x}), llama.edited({site: lambda x: x + 1}):
            llama.logits(IDS)
        torch.testing.assert_close(seen[site], 2 * plain + 1)
        llama.logits(IDS)
        assert torch.equal(seen[site], plain)


def test_hooks_are_removed_after_an_exception(model: LanguageModel) -> None:
    before, hooks = model.logits(IDS), _n_hooks(model)
    with (
        pytest.raises(ZeroDivisionError),
        model.edited({Site(0, "resid_post"): lambda x: x * (1 // 0)}),
    ):
        model.logits(IDS)
    assert torch.equal(model.logits(IDS), before)
    assert _n_hooks(model) == hooks


def _n_hooks(model: LanguageModel) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.hf.modules()
    )


def test_an_edit_that_changes_the_shape_is_refused(llama: LanguageModel) -> None:
    with (
        pytest.raises(ValueError, match="resid_post"),
        llama.edited({Site(0, "resid_post"): lambda x: x[:, :1]}),
    ):
        llama.logits(IDS)


def test_a_cache_gives_the_same_logits_also_under_an_edit(model: LanguageModel) -> None:
    vector = torch.linspace(-1, 1, model.d_model)
    with model.edited({Site(1, "resid_post"): lambda x: x + vector}):
        whole = model.logits(IDS)
        cache = model.new_cache()
        parts = [model.logits(IDS[:, :4], cache=cache)]
        parts += [model.logits(IDS[:, i : i + 1], cache=cache) for i in range(4, IDS.shape[1])]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-4, rtol=1e-4)


def test_left_padding_changes_nothing(model: LanguageModel) -> None:
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), IDS[:1]], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 3).long()[None]
    torch.testing.assert_close(
        model.logits(padded, mask)[:, 3:], model.logits(IDS[:1]), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(
        model.logits(padded, mask, n_last=1), model.logits(IDS[:1])[:, -1:], atol=1e-4, rtol=1e-4
    )


def test_unembedding_and_gain_reproduce_the_logits(model: LanguageModel) -> None:
    """By the definition of the norms: logits = cap(W_U (gain * x/rms + bias))."""
    weight, gain = model.unembedding()
    last = Site(model.n_layers - 1, "resid_post")
    x = model.activations(IDS, [last])[last]
    bias = torch.zeros(model.d_model)
    if any(name in model.name for name in ("GPT", "Phi", "Falcon")):
        x = x - x.mean(-1, keepdim=True)
        bias = model._final_norm().bias
    logits = (x / x.square().mean(-1, keepdim=True).sqrt() * gain + bias) @ weight.T
    if model.hf.get_output_embeddings().bias is not None:
        logits = logits + model.hf.get_output_embeddings().bias
    if "Gemma" in model.name:
        cap = model.hf.config.final_logit_softcapping
        logits = cap * torch.tanh(logits / cap)
    torch.testing.assert_close(logits, model.logits(IDS), atol=2e-3, rtol=1e-3)


def test_the_seed_decides_the_weights_and_the_fingerprint_follows_them(
    llama: LanguageModel,
) -> None:
    again, other = random_llama(), LanguageModel.open(Random(n_layers=3, seed=2), dtype="float32")
    assert again.fingerprint == llama.fingerprint != other.fingerprint
    rounded = LanguageModel.open(Random(n_layers=3, seed=1)).fingerprint
    assert rounded != llama.fingerprint
    assert same_weights(rounded, llama.fingerprint), "bfloat16 is the same model"
    assert not same_weights(other.fingerprint, llama.fingerprint)


def edit_digit(hf: Any) -> None:
    hf.model.layers[2].mlp.up_proj.weight[0, 0] *= 1 + 1e-5  # lost in bfloat16


def edit_weight(hf: Any) -> None:
    hf.model.layers[2].mlp.up_proj.weight[0, 0] += 1


def edit_buffer(hf: Any) -> None:
    hf.model.rotary_emb.inv_freq[1] *= 1.01


def edit_config(hf: Any) -> None:
    hf.config.rms_norm_eps = 1e-3


@pytest.mark.parametrize("edit", [edit_digit, edit_weight, edit_buffer, edit_config])
def test_the_fingerprint_follows_all_that_the_model_reads(
    llama: LanguageModel, edit: Callable[[Any], None]
) -> None:
    changed = copy.deepcopy(llama.loaded.hf)
    edit(changed)
    loaded = LoadedModel(hf=changed, tokenizer=llama.tokenizer, folder=None)
    found = LanguageModel(name=llama.name, loaded=loaded).fingerprint
    assert not same_weights(found, llama.fingerprint)


def test_errors_say_what_is_possible(llama: LanguageModel) -> None:
    with pytest.raises(UserError, match="no such site") as missing:
        llama.activations(IDS, [Site(7, "resid_post"), Site(0, "resid_post")])
    assert "blocks.7.hook_resid_post" in str(missing.value)
    assert "blocks.<0 to 2>" in str(missing.value)
    with pytest.raises(UserError, match="longer than the model's"):
        llama.logits(torch.zeros(1, 257, dtype=torch.long))
    with pytest.raises(UserError, match="vocabulary"):
        llama.activations(torch.tensor([[512]]), [Site(0, "resid_post")])
    with pytest.raises(UserError, match="smollm2-135m"):
        LanguageModel.open(Packaged(name="gpt-5"))
    with pytest.raises(UserError, match="bfloat16"):
        LanguageModel.open(Random(), dtype="int8")
