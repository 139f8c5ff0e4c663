"""SAEs and transcoders that others trained, in place of training: files in any known format, or a
published release by its name → the dictionaries of a run.

1. `paths` maps a kind of site (or `transcoder`) to a pattern; `{layer}` stands for the layer, `*`
   for what differs from file to file. `release` names a repository of a known family instead
   (pipeline/training/releases.py). Every site asked for (`train.sites`, else all of the store) must
   find exactly one file or folder.
2. Each is read by `sae.formats`, which folds scales and thresholds.
3. What the file says of itself is held against the place where it is used: hook, layer, SAE or
   transcoder, input and output, model, widths, conventions that it leaves open. What contradicts is
   refused, all files at once; what the file does not say becomes a note in the metadata and a
   warning of the artifact.
4. SAEs go to `dictionaries/<site>`, transcoders to `transcoders/<output site>`, in the native form,
   so that the later stages see no difference. A dictionary that writes into many layers goes whole
   to `cross_layer`, for the lens of that name.

Cost: reading and writing the tensors once. Sites without a pattern are left out.
"""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import Doc

from data.store import ActivationStore
from featureflow.errors import Problem, UserError
from featureflow.progress import Progress, silent
from featureflow.settings import Settings
from featureflow.sites import Site, SiteKind, parse_site
from pipeline.saes import CROSS_LAYER
from pipeline.training.batch_jobs import DICTIONARIES, TRANSCODERS
from pipeline.training.releases import TRANSCODER, locate, patterns_of
from sae import Sae, save_sae
from sae.cross_layer import CrossLayer
from sae.formats import Conventions, layers_of, read, read_cross_layer, save_cross_layer
from sae.formats.conventions import OPEN

_IDENTITY_BYTES = 1 << 20
Wanted = dict[tuple[str, Site], Path]
"""The file of every site, by the key of the pattern that found it."""


class Imported(Settings):
    """Dictionaries that are read instead of trained."""

    paths: Annotated[
        dict[str, str],
        Doc(
            "pattern for each kind of site, or transcoder (into mlp_out), e.g. resid_post = "
            "'gemma-scope/layer_{layer}/width_16k/*/params.npz'"
        ),
    ] = Field(default_factory=dict)
    release: Annotated[
        str | None, Doc("instead of paths: a published repository, google/gemma-scope-2-1b-pt")
    ] = None
    kinds: Annotated[
        tuple[str, ...],
        Doc("kinds of sites, or transcoder, to take of a release; empty: all but transcoders"),
    ] = ()
    choose: Annotated[
        dict[str, str], Doc("which of a release's dictionaries: width = '65k', l0 = 'medium'")
    ] = Field(default_factory=dict)
    l0: Annotated[
        float | None, Doc("of several with an average L0 in their path, take the nearest")
    ] = None
    cross_layer: Annotated[
        Path | None,
        Doc("the folder of a cross-layer transcoder or crosscoder, kept whole, beside or alone"),
    ] = None
    folder: Annotated[
        Path | None, Doc("folder with copies of repositories; none: the Hub's cache, then the Hub")
    ] = None
    revision: Annotated[
        str, Doc("branch, tag or commit of a release; a commit makes the run repeatable")
    ] = "main"
    format: Annotated[str, Doc("format of the files; auto recognises it")] = "auto"
    model: Annotated[
        str | None,
        Doc("the name that the files give the model, where the activations are of a relative"),
    ] = None
    reads: Annotated[
        SiteKind | None, Doc("what transcoders read, where their files do not say it")
    ] = None
    centred: Annotated[
        bool | None, Doc("whether the stream was centred, where the files do not say it (GPT-2)")
    ] = None
    input_scale: Annotated[
        dict[str, float], Doc("scale of the activations by site, where no file has it: L12 = 0.21")
    ] = Field(default_factory=dict)
    kind: Literal["imported"] = "imported"


def find_imported(choice: Imported, sites: Sequence[Site]) -> Wanted:
    """The file or folder of every site whose kind has a pattern. Raises UserError with every site
    that has none or several, and every kind that no site has."""
    if choice.release is None and not choice.paths and choice.cross_layer is not None:
        return {}
    if (choice.release is None) == (not choice.paths):
        raise UserError(
            "say either paths or release",
            where="train.imported",
            found="both" if choice.paths else "neither",
        )
    if choice.release is not None:
        patterns = patterns_of(choice.release, choice.choose, sites, kinds=choice.kinds)
        where = {"folder": choice.folder, "revision": choice.revision, "l0": choice.l0}
        return locate(choice.release, patterns, **where)  # type: ignore[arg-type]
    found: Wanted = {}
    kinds = tuple(dict.fromkeys(site.kind for site in sites))
    problems = [
        Problem(
            what="no site of this kind is there",
            where=f"train.imported.paths.{key}",
            expected=", ".join([*kinds, *([TRANSCODER] if "mlp_out" in kinds else [])]),
        )
        for key in choice.paths
        if _kind_of(key) not in kinds
    ]
    for key, site in ((key, site) for site in sites for key in choice.paths):
        if site.kind != _kind_of(key):
            continue
        pattern = choice.paths[key].replace("{layer}", str(site.layer))
        matches = sorted(glob.glob(pattern))
        if len(matches) == 1:
            found[key, site] = Path(matches[0])
        else:
            what = "several dictionaries fit" if matches else "no dictionary fits"
            problems.append(
                Problem(
                    what=what,
                    where=f"{site.short}: {pattern}",
                    found=", ".join(matches[:3]) or None,
                )
            )
    if problems:
        raise UserError(
            "the dictionaries to import cannot be found",
            problems=tuple(problems),
            fix="put the files there, or change train.imported.paths",
        )
    return found


def identity_of_imported(choice: Imported) -> str:
    """A digest that changes with the files: names, sizes, first and last megabyte. Cheap for
    gigabytes. Of a release on the Hub it is the name and revision, which the config holds."""
    hasher = hashlib.sha256()
    roots = sorted(choice.paths.items())
    if choice.cross_layer is not None:
        roots.append((CROSS_LAYER, str(choice.cross_layer)))
    if choice.release is not None and choice.folder is not None:
        roots += [("release", str(choice.folder / choice.release))]
        roots += [("release", str(choice.folder / choice.release.rpartition("/")[2]))]
    for kind, pattern in roots:
        for name in sorted(glob.glob(pattern.replace("{layer}", "*"))):
            for path in _files_of(Path(name)):
                size = path.stat().st_size
                hasher.update(f"{kind}:{path.name}:{size}:".encode())
                with path.open("rb") as stream:
                    hasher.update(stream.read(_IDENTITY_BYTES))
                    stream.seek(max(0, size - _IDENTITY_BYTES))
                    hasher.update(stream.read())
    return hasher.hexdigest()


def import_dictionaries(
    choice: Imported,
    store: ActivationStore,
    root: Path,
    *,
    sites: Sequence[Site] = (),
    progress: Progress = silent,
) -> dict[str, dict[Site, Mapping[str, Any]]]:
    """Read the dictionary of every site (none named: all of the store) and write it below `root`;
    returns their metadata by folder and site. Raises UserError with the problems of all files."""
    paths = find_imported(choice, sites or store.sites)
    described: dict[str, dict[Site, Mapping[str, Any]]] = {}
    problems: list[Problem] = []
    for done, ((key, site), path) in enumerate(paths.items()):
        progress("import dictionaries", done, len(paths))
        scale = choice.input_scale.get(site.short)
        try:
            conventions = Conventions(centred=choice.centred, input_scale=scale)
            sae = read(path, format=choice.format, conventions=conventions)
        except UserError as error:
            problems += [_at(path, problem, error.fix) for problem in error.problems]
            continue
        found = list(_contradictions(sae, key, site, store, choice))
        problems += [_at(path, problem) for problem in found]
        if found or problems:
            continue
        _complete(sae, key, site, path, store, choice)
        folder = TRANSCODERS if key == TRANSCODER else DICTIONARIES
        save_sae(sae, root / folder / site.short)
        described.setdefault(folder, {})[site] = sae.metadata
    progress("import dictionaries", len(paths), len(paths))
    if choice.cross_layer is not None:
        try:
            whole = read_cross_layer(choice.cross_layer)
            check_cross_layer(whole, store, choice.model)
            save_cross_layer(whole, root / CROSS_LAYER)
            for site, sae in ({} if paths else layers_of(whole)).items():
                save_sae(sae, root / DICTIONARIES / site.short)
                described.setdefault(DICTIONARIES, {})[site] = sae.metadata
        except UserError as error:
            problems += [_at(choice.cross_layer, problem) for problem in error.problems]
    if problems:
        raise UserError(
            "these files are not what train.imported takes them for", problems=tuple(problems)
        )
    return described


def check_cross_layer(whole: CrossLayer, store: ActivationStore, model: str | None) -> None:
    """Raises UserError where its sites are not stored, have another width, or are of another
    model. `model` is the name that its files give a relative of the store's."""
    problems = []
    for part, reads, writes in zip(whole.parts, whole.reads, whole.writes, strict=True):
        widths = {reads: part.W_enc.shape[1], writes: part.W_dec.shape[2]}
        for site, width in widths.items():
            if site not in store.sites:
                problems.append(Problem(what="the store has no such site", found=site.name))
            elif (stored := store.width(site)) != width:
                found, expected = f"width {width}", f"width {stored}"
                problems.append(
                    Problem(what="width", where=site.name, expected=expected, found=found)
                )
    said, here = whole.metadata.get("model"), model or store.provenance.get("model")
    if said and here and not same_model(said, here):
        problems.append(Problem(what="another model", expected=here, found=said))
    if problems:
        raise UserError(
            "the cross-layer dictionary does not fit the store", problems=tuple(problems)
        )


def warnings_of(described: Mapping[str, Mapping[Site, Mapping[str, Any]]]) -> list[str]:
    """What the files leave open, one sentence for each note, with the sites that have it."""
    sites: dict[str, list[str]] = {}
    for dictionaries in described.values():
        for site, metadata in dictionaries.items():
            for note in metadata.get("notes", ()):
                sites.setdefault(note, []).append(site.short)
    return [f"{', '.join(names)}: {note}" for note, names in sites.items()]


def same_model(one: str, other: str) -> bool:
    """Whether two names mean one model: the Hub's with and without the organisation, and
    TransformerLens'."""
    return _plain(one) == _plain(other)


def _plain(name: str) -> str:
    last = re.sub(r"[^a-z0-9]", "", name.rpartition("/")[2].lower())
    for pattern, plain in ((r"^gpt2small$", "gpt2"), (r"^meta(?=llama)", ""), (_BASE_GEMMA, r"\1")):
        last = re.sub(pattern, plain, last)
    return last


_BASE_GEMMA = r"^(gemma3.*)pt$"


def _contradictions(
    sae: Sae, key: str, site: Site, store: ActivationStore, choice: Imported
) -> Iterator[Problem]:
    """Everything that the file says and that is not so here."""
    metadata = sae.metadata
    transcodes = bool(metadata.get("transcodes"))
    hooks = metadata.get("hooks", {})
    if transcodes != (key == TRANSCODER) and (transcodes or hooks):
        ends = " → ".join(str(hooks.get(end, "?")) for end in ("reads", "writes"))
        yield Problem(
            what="a transcoder is not an SAE of its output"
            if transcodes
            else "an SAE is not a transcoder",
            expected=f"an SAE of {site.name}" if transcodes else f"a transcoder into {site.name}",
            found=f"{ends}; name it in train.imported.paths.{TRANSCODER}"
            if transcodes
            else str(hooks.get("writes")),
        )
        return
    said = hooks.get("writes")
    if said is not None and metadata.get("site") != site.name:
        yield Problem(what="another site", expected=site.name, found=metadata.get("site", said))
    reads = _input_of(sae, key, site, choice)
    if reads is None:
        yield Problem(
            what="the transcoder does not say what it reads"
            if "reads" not in hooks
            else "the transcoder reads what is no site here",
            expected='train.imported.reads = "mlp_in", or another kind of the same block',
            found=hooks.get("reads"),
        )
    elif reads not in store.sites:
        stored = ", ".join(other.short for other in store.sites)
        yield Problem(
            what="what it reads is not stored",
            expected=f"{reads.name}: add {reads.kind} to collect.sites",
            found=stored,
        )
    elif (sae.d_in, sae.d_out) != (widths := (store.width(reads), store.width(site))):
        yield Problem(
            what="the dictionary does not fit the site",
            expected=f"width {widths[0]} in, {widths[1]} out",
            found=f"width {sae.d_in} in, {sae.d_out} out",
        )
    said, here = metadata.get("model"), choice.model or store.provenance.get("model")
    if said and here and not same_model(said, here):
        yield Problem(
            what="another model",
            expected=here,
            found=f"{said}; if it is meant: train.imported.model = {said!r}",
        )
    if "centred" in metadata.get(OPEN, ()):
        yield Problem(
            what="it is in no file whether the stream was centred",
            expected="train.imported.centred = true (TransformerLens' default for GPT-2) or false; "
            "`featureflow sae check` with a model measures both",
        )


def _input_of(sae: Sae, key: str, site: Site, choice: Imported) -> Site | None:
    """What the dictionary encodes; None where neither file nor user says it of a transcoder."""
    if key != TRANSCODER:
        return site
    if "reads" in sae.metadata:
        return parse_site(sae.metadata["reads"])
    if choice.reads is None or "reads" in sae.metadata.get("hooks", {}):
        return None
    return Site(site.layer, choice.reads)


def _complete(
    sae: Sae, key: str, site: Site, path: Path, store: ActivationStore, choice: Imported
) -> None:
    """Fill in what the file leaves open, and note it."""
    metadata = sae.metadata
    notes = list(metadata.get("notes", ()))
    if "site" not in metadata:
        notes.append("the file does not say its site; it is taken for that of the pattern")
    if not metadata.get("model"):
        notes.append("the file does not say its model; it is taken for that of the activations")
    elif not store.provenance.get("model"):
        notes.append("the store does not say its model; it is taken for that of the file")
    elif choice.model is not None:
        notes.append(f"made for {metadata['model']}, used with {store.provenance['model']}")
    metadata.update({"site": site.name, "imported_from": path.name})
    if key == TRANSCODER:
        reads = _input_of(sae, key, site, choice)
        metadata.update({"reads": str(reads), "skip": sae.W_skip is not None})
    if notes:
        metadata["notes"] = notes


def _at(path: Path, problem: Problem, fix: object = None) -> Problem:
    """The same problem, with the file that has it."""
    where = f"{path}: {problem.where}" if problem.where else str(path)
    where = problem.where if problem.where and str(path) in problem.where else where
    expected = "; ".join(filter(None, [problem.expected, str(fix) if fix else None]))
    return Problem(what=problem.what, where=where, expected=expected or None, found=problem.found)


def _kind_of(key: str) -> str:
    return "mlp_out" if key == TRANSCODER else key


def _files_of(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
