"""Published families of dictionaries by name: a repository of the Hub and a site → the file or
folder in it.

1. `FAMILIES` are rules: a pattern of repository names, and for each kind of site the pattern of
   paths there. `{layer}` is filled in, and the family's own words (`{width}`, `{l0}`, …) by what
   the user says, else by their defaults; `*` stands for any name. Rules were taken from SAELens'
   list of releases (6.54.12) and from the repositories' own pages.
2. The repository is looked for in a local folder, then in the Hub's cache, and only then on the
   Hub, of which the chosen files alone are downloaded (HF_HUB_OFFLINE is respected).
3. Where `*` fits several paths, as with Gemma Scope's `average_l0_…`, the user's `l0` chooses the
   nearest; without it the error lists them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from data.cache import hub_snapshot
from featureflow.errors import Problem, UserError
from featureflow.sites import Site

TRANSCODER = "transcoder"
"""The key of transcoders into mlp_out, beside the kinds of sites."""
_BESIDE = ("config.json", "config.yaml", "wandb-config.yaml", "README.md")


@dataclass(frozen=True)
class Family:
    """`repository`: a pattern of whole names, whose named groups are words. `paths`: by kind of
    site or `transcoder`. `words`: defaults of the words that the user may say."""

    repository: str
    paths: Mapping[str, str]
    words: Mapping[str, str] = field(default_factory=dict)


_SCOPE_1 = "layer_{layer}/width_{width}/average_l0_{l0}/params.npz"
_SCOPE_1_WORDS = {"width": "16k", "l0": "*"}
FAMILIES: tuple[Family, ...] = (
    Family(
        r"google/gemma-scope-2-\d+[mb]-(pt|it)",
        {
            kind: f"{name}{{set}}/layer_{{layer}}_width_{{width}}_l0_{{l0}}{{affine}}"
            for kind, name in (
                ("resid_post", "resid_post"),
                ("mlp_out", "mlp_out"),
                ("z", "attn_out"),
                (TRANSCODER, "transcoder"),
            )
        },
        {"set": "_all", "width": "16k", "l0": "big", "affine": ""},
    ),
    *(
        Family(rf"google/gemma-scope-\d+b-(pt|it)-{name}", {kind: _SCOPE_1}, _SCOPE_1_WORDS)
        for name, kind in (
            ("res", "resid_post"),
            ("mlp", "mlp_out"),
            ("att", "z"),
            ("transcoders", TRANSCODER),
        )
    ),
    Family(r"Qwen/SAE-Res-.+-W\d+K-L0_\d+", {"resid_post": "layer{layer}.sae.pt"}),
    *(
        Family(
            rf"fnlp/Llama3_1-8B-Base-LX{letter}-(?P<times>\d+x)",
            {kind: f"Llama3_1-8B-Base-L{{layer}}{letter}-{{times}}"},
        )
        for letter, kind in (
            ("R", "resid_post"),
            ("M", "mlp_out"),
            ("A", "attn_out"),
            ("TC", TRANSCODER),
        )
    ),
    Family(
        r"fnlp/Llama-Scope-R1-Distill",
        {"resid_post": "{mix}/L{layer}R"},
        {"mix": "400M-Slimpajama-400M-OpenR1-Math-220k"},
    ),
    Family(
        r"OpenMOSS-Team/Llama-Scope-2-.+",
        {TRANSCODER: "transcoder/{width}/{k}/layer{layer}_transcoder_{width}_{k}"},
        {"width": "8x", "k": "k64"},
    ),
    Family(
        r"(mwhanna|facebook)/.+-transcoders(-lowl0)?", {TRANSCODER: "layer_{layer}.safetensors"}
    ),
    Family(
        r"EleutherAI/(?!.*transcoder).+",
        {"resid_post": "layers.{layer}", "mlp_out": "layers.{layer}.mlp"},
    ),
    Family(r"EleutherAI/.*transcoder.*", {TRANSCODER: "layers.{layer}.mlp"}),
    Family(
        r"chanind/gemma-2-2b-batch-topk-matryoshka-saes-.+",
        {"resid_post": "{set}/blocks.{layer}.hook_resid_post"},
        {"set": "standard"},
    ),
    Family(r"chanind/.+-matryoshka-saes-.+", {"resid_post": "blocks.{layer}.hook_resid_post"}),
    Family(
        r"andyrdt/saes-.+",
        {"resid_post": "resid_post_layer_{layer}/trainer_{trainer}"},
        {"trainer": "1"},
    ),
    Family(
        r"(canrager|adamkarvonen)/(saebench_.+|lm_sae)",
        {"resid_post": "{sweep}/resid_post_layer_{layer}/trainer_{trainer}"},
        {"sweep": "*", "trainer": "0"},
    ),
    Family(r"ckkissane/attn-saes-gpt2-small-all-layers", {"z": "gpt2-small_L{layer}_Hcat_z_*.pt"}),
    Family(r"jbloom/GPT2-Small-SAEs-Reformatted", {"resid_pre": "blocks.{layer}.hook_resid_pre"}),
    *(
        Family(
            rf"jbloom/GPT2-Small-OAI-v5-(?P<width>\d+k)-{name}-SAEs",
            {kind: "v5_{width}_layer_{layer}{end}"},
            {"end": ""},
        )
        for name, kind in (
            ("attn-out", "attn_out"),
            ("mlp-out", "mlp_out"),
            ("resid-mid", "resid_mid"),
            ("resid-post", "resid_post"),
        )
    ),
    Family(
        r"tommmcgrath/gpt2-small-mlp-out-saes",
        {"mlp_out": "sae_group_gpt2_blocks.{layer}.hook_mlp_out_24576:v*"},
    ),
    Family(
        r"jbloom/Gemma-2b-Residual-Stream-SAEs",
        {"resid_post": "gemma_2b_blocks.{layer}.hook_resid_post_16384*"},
    ),
    Family(
        r"JoshEngels/Mistral-7B-Residual-Stream-SAEs", {"resid_pre": "mistral_7b_layer_{layer}"}
    ),
    Family(r"Goodfire/.+-SAE-l\d+", {"resid_post": "*-SAE-l{layer}.p*"}),
)


def patterns_of(
    release: str, words: Mapping[str, str], sites: Sequence[Site], *, kinds: Sequence[str] = ()
) -> dict[tuple[str, Site], str]:
    """The pattern of paths for every site that the family has, by its key there and the site. No
    `kinds` means all but transcoders, which are taken where there is nothing else. Raises UserError
    for a release of no family, words and kinds that it does not have, and no site of its kinds."""
    family, groups = _family_of(release)
    kinds = kinds or [kind for kind in family.paths if kind != TRANSCODER] or [TRANSCODER]
    if unknown := sorted(set(words) - set(family.words)):
        raise UserError(
            "this release has no such choice",
            where="train.imported.choose",
            expected=", ".join(f"{word} (now {value!r})" for word, value in family.words.items())
            or "none",
            found=", ".join(unknown),
        )
    filled = {**family.words, **groups, **words}
    found = {
        (key, site): path.format(layer=site.layer, **filled)
        for site in sites
        for key, path in family.paths.items()
        if key in kinds and site.kind == ("mlp_out" if key == TRANSCODER else key)
    }
    if not found or set(kinds) - set(family.paths):
        raise UserError(
            "the release has no dictionaries of these sites",
            where=f"train.imported.release: {release}",
            expected=", ".join(family.paths),
            found=", ".join(dict.fromkeys([*kinds, *(site.kind for site in sites)])),
            fix="collect one of the kinds that it has, or change train.sites",
        )
    return found


def _family_of(release: str) -> tuple[Family, dict[str, str]]:
    for family in FAMILIES:
        if match := re.fullmatch(family.repository, release):
            return family, match.groupdict()
    known = ", ".join(
        re.sub(r"\(\?P<(\w+)>[^)]*\)", r"{\1}", family.repository).replace("\\", "")
        for family in FAMILIES
    )
    raise UserError(
        "no family of dictionaries is known by this name",
        where="train.imported.release",
        expected=known,
        found=release,
        fix="download it and give train.imported.paths",
    )


def locate(
    release: str,
    patterns: Mapping[tuple[str, Site], str],
    *,
    folder: Path | None = None,
    revision: str = "main",
    l0: float | None = None,
) -> dict[tuple[str, Site], Path]:
    """The file or folder of every pattern: below `folder`, in the Hub's cache, or downloaded.
    Raises UserError with every pattern that fits nothing, or several paths."""
    if folder is not None:
        root = _local(folder, release)
        return {at: root / p for at, p in _chosen(patterns, _names_below(root), root, l0).items()}
    cached = hub_snapshot(release, revision)
    here = _names_below(cached) if cached is not None else []
    names = here
    if not all("*" not in pattern and _fitting(pattern, here) for pattern in patterns.values()):
        names = _names_on_the_hub(release, revision, here)  # of what fits, more than is here
    chosen = _chosen(patterns, names, release, l0)
    if cached is None or not all(_fitting(path, here) for path in chosen.values()):
        cached = _downloaded(release, revision, sorted(set(chosen.values())))
    return {at: cached / path for at, path in chosen.items()}


def _local(folder: Path, release: str) -> Path:
    """The copy of a repository below a folder, under its whole or its last name."""
    places = [folder / release, folder / release.rpartition("/")[2]]
    for place in places:
        if place.is_dir():
            return place
    raise UserError(
        "there is no copy of the release here",
        where=f"train.imported.folder: {folder}",
        expected=" or ".join(map(str, places)),
        fix=f"download {release} there, or leave out train.imported.folder",
    )


def _names_below(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]


def _chosen(
    patterns: Mapping[tuple[str, Site], str], names: Sequence[str], where: object, l0: float | None
) -> dict[tuple[str, Site], str]:
    """One path for every pattern."""
    found: dict[tuple[str, Site], str] = {}
    problems = []
    for at, pattern in patterns.items():
        fitting = _fitting(pattern, names)
        if len(fitting) > 1 and l0 is not None:
            fitting = [min(fitting, key=lambda path: abs(_l0_of(path) - l0))]
        if len(fitting) == 1:
            found[at] = fitting[0]
            continue
        what = "several fit" if fitting else "nothing fits"
        listed = ", ".join(fitting[:6]) or None
        problems.append(Problem(what=what, where=f"{at[1].short}: {pattern}", found=listed))
    if problems:
        several = any(problem.what == "several fit" for problem in problems)
        raise UserError(
            f"the dictionaries cannot be found in {where}",
            problems=tuple(problems),
            fix="say train.imported.l0, the nearest is taken"
            if several
            else "change train.imported.choose, or name the layers that there are in train.sites",
        )
    return found


def _fitting(pattern: str, names: Sequence[str]) -> list[str]:
    """The files and folders that a pattern means."""
    expression = re.compile("[^/]*".join(map(re.escape, pattern.split("*"))) + r"(?=/|$)")
    return sorted({match[0] for name in names if (match := expression.match(name))})


def _l0_of(path: str) -> float:
    match = re.search(r"l0_(\d+(?:\.\d+)?)", path)
    return float(match[1]) if match else float("inf")


def _names_on_the_hub(release: str, revision: str, here: list[str]) -> list[str]:
    """All files of the repository; where the Hub cannot be asked, those that are here."""
    try:
        return HfApi().list_repo_files(release, revision=revision)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        if here:
            return here  # the error then names the layers that are not in it
        raise UserError(
            "the release is not in the cache, and the Hub cannot be asked",
            where=f"train.imported.release: {release}",
            expected="network access, or a copy",
            found=first[:200],
            fix="put a copy into a folder and name it in train.imported.folder",
        ) from error


def _downloaded(release: str, revision: str, paths: Sequence[str]) -> Path:
    """The snapshot with the chosen paths and the descriptions at the root."""
    wanted = [*_BESIDE, *paths, *(f"{path}/*" for path in paths)]
    wanted += [f"{path.removesuffix('.pt')}_cfg.json" for path in paths if path.endswith(".pt")]
    return Path(snapshot_download(release, revision=revision, allow_patterns=wanted))
