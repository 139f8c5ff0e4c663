"""Files both ways with circuit-tracer itself. Runs in its environment, imports nothing of
featureflow.

python check_circuit_tracer.py write FOLDER   circuit-tracer saves transcoder sets and cross-layer
                                              transcoders, with inputs, latents and reconstructions
python check_circuit_tracer.py read FOLDER    circuit-tracer opens every set under FOLDER and
                                              reports, as one JSON line each, how far its latents
                                              and reconstructions are from those in case.npz
python check_circuit_tracer.py attribute FOLDER
                                              circuit-tracer attributes answer less foil of case.npz
                                              through FOLDER/transcoders in the Llama FOLDER/model;
                                              the graph goes to graph.npz, its scores are printed
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from circuit_tracer.attribution.attribute import attribute
from circuit_tracer.attribution.targets import CustomTarget
from circuit_tracer.graph import compute_graph_scores
from circuit_tracer.replacement_model.replacement_model_transformerlens import (
    TransformerLensReplacementModel,
)
from circuit_tracer.transcoder.activation_functions import JumpReLU
from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder
from circuit_tracer.transcoder.single_layer_transcoder import (
    SingleLayerTranscoder,
    load_transcoder_set,
)
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions.llama import convert_llama_weights
from transformers import LlamaForCausalLM

D, N, LAYERS, TOKENS = 24, 96, 3, 200


def write(root: Path) -> None:
    torch.manual_seed(0)
    for name in ("relu", "jumprelu", "skip"):
        (root / name).mkdir(parents=True)
        config = {"model_kind": "transcoder_set", "model_name": "a-model", "scan": "a"}
        config |= {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}
        (root / name / "config.yaml").write_text(yaml.safe_dump(config))
        x, latents, out = torch.randn(LAYERS, TOKENS, D), [], []
        for layer in range(LAYERS):
            act = JumpReLU(torch.rand(N), 0.1) if name == "jumprelu" else F.relu
            one = SingleLayerTranscoder(D, N, act, layer, skip_connection=name == "skip").float()
            randomise(one)
            one.to_safetensors(str(root / name / f"layer_{layer}.safetensors"))
            with torch.no_grad():
                latents.append(one.encode(x[layer]))
                out.append(one(x[layer]))
        save(root / name, x, torch.stack(latents), torch.stack(out))
    for name, kind in (("clt_relu", "relu"), ("clt_jumprelu", "jump_relu")):
        clt = CrossLayerTranscoder(
            LAYERS, N, D, activation_function=kind, lazy_decoder=False, dtype=torch.float32
        )
        randomise(clt)
        clt.to_safetensors(str(root / name))
        (root / name / "config.yaml").write_text("model_kind: cross_layer_transcoder\n")
        x = torch.randn(LAYERS, TOKENS, D)
        with torch.no_grad():
            save(root / name, x, clt.encode(x), clt(x))


def randomise(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
            if "threshold" in name:
                parameter.abs_()


def save(folder: Path, x: torch.Tensor, latents: torch.Tensor, out: torch.Tensor) -> None:
    arrays = {"x": x, "latents": latents, "reconstruction": out}
    np.savez(folder / "case.npz", **{name: array.numpy() for name, array in arrays.items()})


def read(root: Path) -> None:
    for folder in sorted(path.parent for path in root.glob("*/case.npz")):
        config = yaml.safe_load((folder / "config.yaml").read_text())
        paths = {i: str(folder / f"layer_{i}.safetensors") for i in range(LAYERS)}
        opened = load_transcoder_set(
            paths,
            scan=config["scan"],
            feature_input_hook=config["feature_input_hook"],
            feature_output_hook=config["feature_output_hook"],
            device=torch.device("cpu"),
        )
        case = {n: torch.from_numpy(value) for n, value in np.load(folder / "case.npz").items()}
        with torch.no_grad():
            latents = torch.stack([opened[i].encode(case["x"][i]) for i in range(LAYERS)])
            out = torch.stack([opened[i](case["x"][i]) for i in range(LAYERS)])
        record = {"case": folder.name, "active": int((latents != 0).sum())}
        record["same_active"] = bool(((latents != 0) == (case["latents"] != 0)).all())
        difference = (out - case["reconstruction"]).abs().max() / out.abs().max()
        print(json.dumps({**record, "reconstruction_difference": difference.item()}), flush=True)


def attribute_case(root: Path) -> None:
    hf = LlamaForCausalLM.from_pretrained(root / "model", dtype=torch.float32)
    case, at = np.load(root / "case.npz"), hf.config
    shape = HookedTransformerConfig(
        n_layers=at.num_hidden_layers,
        d_model=at.hidden_size,
        n_ctx=at.max_position_embeddings,
        d_head=at.hidden_size // at.num_attention_heads,
        n_heads=at.num_attention_heads,
        d_mlp=at.intermediate_size,
        d_vocab=at.vocab_size,
        eps=at.rms_norm_eps,
        act_fn="silu",
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_dim=at.hidden_size // at.num_attention_heads,
        rotary_adjacent_pairs=False,
        final_rms=True,
        gated_mlp=True,
        model_name="a-model",
        device="cpu",
    )
    config = yaml.safe_load((root / "transcoders" / "config.yaml").read_text())
    paths = {i: str(root / "transcoders" / f"layer_{i}.safetensors") for i in range(shape.n_layers)}
    hooks = {name: config[name] for name in ("feature_input_hook", "feature_output_hook")}
    opened = load_transcoder_set(paths, scan="a", device=torch.device("cpu"), **hooks)
    model = TransformerLensReplacementModel(shape)
    model.load_state_dict(convert_llama_weights(hf, shape), strict=False)
    model._configure_replacement_model(opened)
    start = int(case["ids"][0])
    model.tokenizer = SimpleNamespace(
        vocab_size=shape.d_vocab,
        all_special_ids=[start],
        bos_token_id=start,
        decode=str,
        padding_side="right",
    )
    vector = model.unembed.W_U[:, int(case["answer"])] - model.unembed.W_U[:, int(case["foil"])]
    target = CustomTarget("y", 1.0, vector.detach())
    graph = attribute(torch.tensor(case["ids"]), model, attribution_targets=[target])
    features = graph.active_features[graph.selected_features].numpy()
    np.savez(root / "graph.npz", features=features, effects=graph.adjacency_matrix.numpy())
    replacement, completeness = compute_graph_scores(graph)
    print(json.dumps({"replacement": replacement, "completeness": completeness}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["write", "read", "attribute"])
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    {"write": write, "read": read, "attribute": attribute_case}[arguments.what](arguments.folder)
