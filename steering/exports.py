"""Plans for other programs: llama.cpp control vectors (GGUF), plain vectors (safetensors),
Neuronpedia steering requests.

Only a plan that adds fixed vectors to the residual stream can leave its activations behind: a
control vector has no encoder, no scope and no gate. Anything else is refused, with every reason.

- GGUF: architecture `controlvector`, tensors `direction.<layer>` float32 `[d_model]`, added to the
  *output* of block `layer`; llama.cpp numbers its layers so that block 0 cannot be steered, so a
  plan that needs it is refused. Strength, weights and scales are folded in: load it with scale 1.
- safetensors: the same vectors named by site, with the plan and its digests in the metadata.
- Neuronpedia: one entry a feature with `modelId`, `layer`, `index`, `strength`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from featureflow.errors import Problem, UserError
from featureflow.sites import Site
from steering.edits import Add
from steering.hooks import direction_of_node
from steering.plan import Plan, is_linear
from steering.plan_files import plan_document
from steering.scopes import Everywhere
from steering.sequences import Dictionary

_ARCHITECTURE = "controlvector"


def added_vectors(
    plan: Plan, saes: Mapping[Site, Dictionary]
) -> dict[Site, Float[Tensor, "d_model"]]:
    """What the plan adds at each site, everything folded in. Raises UserError if it does more than
    add."""
    if not is_linear(plan):
        raise UserError(
            f"a plan that does `{plan.edit.kind}` has no fixed vectors: what it adds depends on "
            "the activation",
            expected="a plan with the edit add",
            fix="make the plan with edit add, or export the plan itself (.safetensors)",
        )
    found: dict[Site, Tensor] = {}
    for node in plan.nodes:
        direction = direction_of_node(node, plan, saes).detach().float().cpu()
        vector = (
            direction
            / direction.norm().clamp(min=1e-12)
            * (plan.strength * node.weight * node.scale)
        )
        found[node.site] = found[node.site] + vector if node.site in found else vector
    return found


def write_gguf(
    plan: Plan, saes: Mapping[Site, Dictionary], path: str | Path, *, model_type: str
) -> Path:
    """Write a llama.cpp control vector. `model_type` is the Hugging Face name of the architecture
    (llama, gemma2 …)."""
    vectors = added_vectors(plan, saes)
    if problems := tuple(_obstacles(plan, vectors)):
        raise UserError("a control vector cannot hold this plan", problems=problems)
    writer = GGUFWriter(str(path), _ARCHITECTURE)
    writer.add_string(f"{_ARCHITECTURE}.model_hint", model_type)
    writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len(vectors))
    writer.add_string("featureflow.plan", json.dumps(plan_document(plan), ensure_ascii=False))
    for site in sorted(vectors):
        writer.add_tensor(f"direction.{site.layer}", vectors[site].numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def write_vectors(plan: Plan, saes: Mapping[Site, Dictionary], path: str | Path) -> Path:
    """Write `<site name> → vector` as safetensors, the plan in the metadata under `plan`."""
    vectors = {site.name: vector.contiguous() for site, vector in added_vectors(plan, saes).items()}
    document = json.dumps(plan_document(plan), ensure_ascii=False)
    save_file(vectors, path, metadata={"plan": document, "format": "featureflow-vectors"})
    return Path(path)


def neuronpedia_request(
    plan: Plan,
    *,
    model_id: str,
    sources: Mapping[Site, str],
    prompt: str,
    n_tokens: int = 64,
    seed: int = 0,
) -> dict[str, Any]:
    """The body of a Neuronpedia steering request. `sources` names the dictionary of each site
    there, such as `12-res-jb`. Raises UserError for what the service cannot do."""
    if not is_linear(plan):
        what = (
            "Neuronpedia cannot do "
            f"`{plan.edit.kind}`{' with keep_norm' if isinstance(plan.edit, Add) else ''}"
        )
        raise UserError(what, expected="a plan with the edit add, without keep_norm")
    problems = [
        Problem(what="Neuronpedia steers features where they were found", where=node.at)
        for node in plan.nodes
        if not node.is_feature
    ]
    problems += [
        Problem(what="no source is named for this site", where=site.short)
        for site in plan.by_site()
        if site not in sources
    ]
    if not isinstance(plan.scope, Everywhere):
        problems.append(
            Problem(what="Neuronpedia steers every token", where="scope", found=plan.scope.kind)
        )
    if problems:
        raise UserError("this plan cannot be asked of Neuronpedia", problems=tuple(problems))
    features = [
        {
            "modelId": model_id,
            "layer": sources[node.site],
            "index": node.feature.latent if node.feature else 0,
            "strength": plan.strength * node.weight * node.scale,
        }
        for node in plan.nodes
    ]
    return {
        "modelId": model_id,
        "prompt": prompt,
        "features": features,
        "steer_method": "SIMPLE_ADDITIVE",
        "normalize_steering": False,
        "strength_multiplier": 1,
        "steer_special_tokens": plan.skip_first == 0,
        "n_tokens": n_tokens,
        "temperature": 0.8,
        "freq_penalty": 0,
        "seed": seed,
    }


def _obstacles(plan: Plan, vectors: Mapping[Site, Tensor]) -> Iterator[Problem]:
    for site in vectors:
        if site.kind != "resid_post":
            yield Problem(
                what="control vectors are added to the residual stream only", where=site.short
            )
        elif site.layer == 0:
            yield Problem(what="llama.cpp cannot steer the output of block 0", where=site.short)
    if not isinstance(plan.scope, Everywhere):
        yield Problem(
            what="a control vector is added at every token", where="scope", found=plan.scope.kind
        )
