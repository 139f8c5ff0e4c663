"""Which language model: a union of small choices, each owning only its own fields. Importing this
is cheap."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from annotated_types import Ge, Gt
from pydantic import model_validator
from typing_extensions import Doc

from data.packaged import shown_name
from data.worlds import AnyWorld
from featureflow.settings import ByKind, Settings


class Packaged(Settings):
    """A model that ships inside a package of the registry and needs no other network."""

    kind: Literal["packaged"] = "packaged"
    name: Annotated[str, Doc("name of the packaged model; `smollm2-135m` is the one known")] = (
        "smollm2-135m"
    )


class HuggingFace(Settings):
    """A model of the Hugging Face Hub; downloaded once by its own client, or found in its cache
    when offline."""

    kind: Literal["huggingface"] = "huggingface"
    name: Annotated[str, Doc("model id on the Hub, such as `openai-community/gpt2`")]
    revision: Annotated[str, Doc("branch, tag or commit; a commit makes the run repeatable")] = (
        "main"
    )


class Folder(Settings):
    """A local folder as `save_pretrained` leaves it: config.json, *.safetensors and the tokenizer's
    files."""

    kind: Literal["folder"] = "folder"
    path: Annotated[Path, Doc("folder with config.json, *.safetensors and tokenizer files")]


class Gguf(Settings):
    """A GGUF file; its weights are dequantised once into the cache."""

    kind: Literal["gguf"] = "gguf"
    path: Annotated[Path, Doc("a .gguf file of an architecture that transformers can read")]


class TransformerLens(Settings):
    """A model by the name TransformerLens gives it (`gpt2-small`, `pythia-70m`)."""

    kind: Literal["transformer_lens"] = "transformer_lens"
    name: Annotated[str, Doc("a TransformerLens name or alias, such as `gpt2-small`")]


class Random(Settings):
    """A Llama built from this config with random weights, and a small byte-level tokenizer:
    seconds, no downloads."""

    kind: Literal["random"] = "random"
    n_layers: Annotated[int, Ge(1), Doc("transformer blocks")] = 4
    d_model: Annotated[int, Ge(2), Doc("width of the residual stream")] = 32
    n_heads: Annotated[
        int, Ge(1), Doc("attention heads; they divide d_model into parts of even width")
    ] = 4
    d_mlp: Annotated[int, Ge(1), Doc("width of the MLP's hidden layer")] = 64
    n_context: Annotated[int, Ge(2), Doc("longest context in tokens")] = 256
    d_vocab: Annotated[
        int,
        Ge(257),
        Doc("tokens: 256 bytes, one separator, the rest merges learned from the bundled text"),
    ] = 512
    scale: Annotated[
        float, Gt(0), Doc("standard deviation of the random weights, times 1/sqrt of their fan-in")
    ] = 1.0
    seed: Annotated[int, Ge(0), Doc("seed of the weights")] = 0

    @model_validator(mode="after")
    def _checked(self) -> Self:
        if self.d_model % (2 * self.n_heads) != 0:
            raise ValueError(
                f"d_model {self.d_model} is not a multiple of 2 x n_heads = {2 * self.n_heads}"
            )
        return self


class OfWorld(Settings):
    """The model of a world where the answer is known (data/worlds)."""

    kind: Literal["world"] = "world"
    world: Annotated[AnyWorld, Doc("which world")]
    weights: Annotated[
        str, Doc("shipped (or written by hand), untrained, or a .safetensors file of `world train`")
    ] = "shipped"


ModelSpec = Annotated[
    Packaged | HuggingFace | Folder | Gguf | TransformerLens | Random | OfWorld, ByKind()
]


def name_of(spec: ModelSpec) -> str:
    """A short name for titles and provenance; never a full path."""
    match spec:
        case Folder(path=path) | Gguf(path=path):
            return Path(path).name
        case Packaged(name=name):
            return shown_name(name)
        case Random():
            return f"random-{spec.n_layers}x{spec.d_model}-seed{spec.seed}"
        case OfWorld(world=world, weights=weights):
            return world.kind if weights == "shipped" else f"{world.kind}, {Path(weights).stem}"
        case _:
            return spec.name
