"""The tutorial of docs/any-module.md, as it is written but for fewer steps: an image model becomes
an atlas; and every lens looks at such a run or says in a sentence why it does not."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path

import pytest

from featureflow.errors import UserError
from pipeline.lenses.base import find_lens, lens_names, run_lens
from pipeline.run import Run
from pipeline.site.shards import read_shard
from pipeline.site.validate import validate_atlas

ROOT = Path(__file__).parents[2]
FEWER = {
    "range(10)": "range(1)",
    "ff.RunContext()": "ff.RunContext(n_threads=1)",
    '"collect.imported": "digits.zarr"': '"collect.imported": "digits.zarr", "train.steps": "60",'
    ' "train.n_latents": "64", "link.n_null": "300", "link.functional_tokens": "2048"',
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    text = (ROOT / "docs" / "any-module.md").read_text()
    for written, fewer in FEWER.items():
        assert text.count(written) == 1
        text = text.replace(written, fewer)
    folder, session = tmp_path_factory.mktemp("any"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
            exec(compile(block, "docs/any-module.md", "exec"), session)
    return Run.open(folder / "artifacts" / "digits")


def test_the_atlas_shows_the_images_on_which_a_feature_is_active(run: Run) -> None:
    site = run.artifact("atlas").path / "site"
    validate_atlas(site.parent)
    manifest = json.loads((site / "manifest.json").read_text())
    assert [each["short"] for each in manifest["sites"]] == [f"M{i}.blocks.{i}" for i in range(4)]
    assert manifest["model"]["name"] == "digit reader"
    assert {label["name"] for label in manifest["corpus"]["labels"]} == {
        f"digit {i}" for i in range(10)
    }
    documents = read_shard(site, "corpus/documents").json
    assert len(documents["images"]) == len(documents["titles"]) == 1797
    examples = run.features.examples_of("M2.blocks.2/5", tab="top")
    assert examples["document"].nunique() == len(examples) > 3, "an image is shown once"


@pytest.mark.slow
@pytest.mark.parametrize("name", lens_names())
def test_a_lens_looks_or_refuses_in_a_sentence(name: str, run: Run) -> None:
    lens = find_lens(name)
    few = {"n_tokens": 1024, "n_resamples": 20, "steps": 10, "n_seeds": 1}
    config = lens.Config(**{k: v for k, v in few.items() if k in lens.Config.model_fields})
    with suppress(UserError):
        run_lens(name, run, config).verify()


def test_what_needs_text_refuses_alike(run: Run) -> None:
    for use in (lambda: run.model, lambda: run.sample("a", [None])):
        with pytest.raises(UserError, match="this needs a language model"):
            use()
