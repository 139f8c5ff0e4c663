"""The artifacts of one run, opened together and only if they belong together.

`featureflow train --train.n_latents 4096` replaces the dictionaries and leaves the flow graph and
the atlas of the earlier ones beside them: latent 402 is another feature then. Stages never read
such a pair (the schedule compares digests); what opens a finished run (steering, the live atlas,
second opinions, exports) comes through here. An artifact records the digests of what it was made
from, so nothing is read but manifests.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from featureflow.errors import Problem, UserError
from pipeline.artifact import SCHEMAS, Artifact


def open_run(root: Path, stages: Sequence[str]) -> dict[str, Artifact]:
    """The artifacts `root/<stage>`. Raises UserError for one that is missing, damaged or made from
    others."""
    opened = {
        stage: Artifact.open(root / stage, kind=stage, schema=SCHEMAS[stage]) for stage in stages
    }
    if problems := tuple(misfits(opened)):
        raise UserError(
            "these artifacts do not belong together: a stage was made anew and those after it were "
            "not",
            problems=problems,
            fix=f"featureflow run --to {max(stages, key=list(SCHEMAS).index)}",
        )
    return opened


def whole_run(root: Path, made: Sequence[Artifact]) -> list[Artifact]:
    """These artifacts and those of other stages in `root` that were made from them, in the order of
    the stages."""
    found = {artifact.kind: artifact for artifact in made}
    for stage in SCHEMAS:
        if stage not in found:
            with suppress(UserError):
                other = Artifact.open(root / stage, kind=stage, schema=SCHEMAS[stage])
                if not any(misfits({**found, stage: other})):
                    found[stage] = other
    return [found[stage] for stage in SCHEMAS if stage in found]


def misfits(opened: Mapping[str, Artifact]) -> Iterator[Problem]:
    """Every artifact that was made from another one than that of the same stage among these."""
    for artifact in opened.values():
        for stage, digest in artifact.inputs.items():
            if stage in opened and opened[stage].digest != digest:
                yield Problem(
                    what=f"made from another {stage} artifact",
                    where=str(artifact.path),
                    expected=f"{opened[stage].digest[:12]}, that of {opened[stage].path}",
                    found=digest[:12],
                )
