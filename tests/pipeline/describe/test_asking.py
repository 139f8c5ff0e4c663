"""Features about a word are those whose texts hold it; a text that is read shows what the
dictionary does on it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch

from data.model.language_model import LanguageModel
from data.model.spec import Random
from featureflow.errors import UserError
from featureflow.sites import parse_site
from pipeline.cli import run_command
from pipeline.cli.flow import labels_beside
from pipeline.describe.asking import find_features, middle_site, read_text
from pipeline.describe.features import Features
from pipeline.run import Run
from sae import load_sae
from tests.pipeline.small_run import D_MODEL

TEXT = "The river runs to the sea."


def features_of(*rows: tuple) -> Features:
    """One site whose features have these labels, acceptance, scores, tokens and
    promoted tokens."""
    frame = pd.DataFrame(
        rows, columns=["label", "label_accepted", "label_score", "tokens", "promotes"]
    ).assign(feature=[f"L0/{i}" for i in range(len(rows))], site="L0", alive=True, density=0.01)
    made = Features(Path("nowhere"))
    made.__dict__ |= {"table": frame, "_extent": {"L0": (0, len(rows))}}
    return made


def test_a_word_is_found_where_words_begin_and_accepted_labels_come_first() -> None:
    features = features_of(
        ("active on ‘ research’", True, 0.9, [" research"], []),
        ("no simple rule", False, float("nan"), [" Seal", " x"], []),
        ("no simple rule", False, 0.3, [], [" sea"]),
        ("active on ‘ sea’", True, 0.7, [" sea"], [" seas"]),
        ("active on ‘ sea’, ‘ bay’", True, 0.8, [" sea"], []),
        ("no simple rule · strongest on ‘ sea’", False, 0.5, [" sea"], []),
    )
    found = find_features(features, "sea")
    assert [f.feature for f in found] == ["L0/4", "L0/3", "L0/5", "L0/1", "L0/2"]
    assert found[1].where == ("label", "tokens", "promotes")
    assert found[3].where == ("tokens",)
    assert [f.feature for f in find_features(features, " RESEARCH ")] == ["L0/0"]
    assert find_features(features, "s.a") == []
    with pytest.raises(UserError, match="empty"):
        find_features(features, "  ")
    with pytest.raises(UserError, match="no features are described at L7"):
        find_features(features, "sea", site=parse_site("L7"))


def test_a_text_is_read_as_the_dictionary_reads_it(small_run) -> None:
    root = small_run.root
    run = Run.open(root)
    opened = (run.model, run.features, run.saes)
    tokens = read_text(*opened, TEXT, site=parse_site("L1"), n=2)
    model = LanguageModel.open(Random(n_layers=3, d_model=D_MODEL, n_heads=2, d_mlp=32))
    ids = [model.tokenizer.bos_id, *model.tokenizer.encode(TEXT)]
    site = parse_site("L1")
    z = load_sae(root / "train" / "dictionaries" / "L1").encode(
        model.activations(torch.tensor([ids]), [site])[site][0].float()
    )[1:]
    assert "".join(token.text for token in tokens) == TEXT
    features = run.features.table.set_index("feature")
    for token, row in zip(tokens, z, strict=True):
        value, latent = row.sort(descending=True)
        assert [f.feature.latent for f in token.active] == latent[:2].tolist()
        assert [f.value for f in token.active] == pytest.approx(value[:2].tolist(), rel=1e-3)
        for one in token.active:
            assert one.share == pytest.approx(
                one.value / features.loc[str(one.feature), "max"], rel=1e-6
            )
    for text in ("", "word " * 3000):
        with pytest.raises(UserError, match="empty or too long"):
            read_text(*opened, text)
    with pytest.raises(UserError, match=r"described at L2\.mlp"):
        read_text(*opened, TEXT, site=parse_site("L2.mlp"))
    assert middle_site(run.features.sites) == parse_site("L1")


def test_both_questions_are_commands(small_run, tmp_path, capsys) -> None:
    (tmp_path / "small").symlink_to(small_run.root)
    here = ["-r", "small", "--artifacts", str(tmp_path)]
    assert run_command(["atlas", "read", TEXT, "-n", "1", *here]) == 0
    run = Run.open(small_run.root)
    n_tokens = len(read_text(run.model, run.features, run.saes, TEXT))
    assert len(capsys.readouterr().out.splitlines()) == n_tokens
    assert run_command(["atlas", "find", "zzzz", *here]) == 0
    assert "no feature is about 'zzzz'" in capsys.readouterr().out
    assert run_command(["atlas", "read", "", *here]) == 2


def test_a_graph_made_anew_gets_no_labels_of_the_earlier_atlas_and_is_said_to_be_another(
    small_run, tmp_path, capsys
) -> None:
    root = tmp_path / "small"
    root.mkdir()
    for artifact in (small_run.collect, small_run.train, small_run.describe):
        (root / artifact.path.name).symlink_to(artifact.path)
    shutil.copytree(small_run.link.path, root / "link")
    trunks = ["flow", "trunks", "-r", "small", "--artifacts", str(tmp_path), "-n", "1"]
    assert labels_beside(Run.open(root)) is not None
    assert run_command(trunks) == 0
    assert capsys.readouterr().err == ""
    manifest = json.loads((root / "link" / "manifest.json").read_text())
    changed = {**manifest, "digest": "0" * 64, "inputs": {**manifest["inputs"], "train": "1" * 64}}
    (root / "link" / "manifest.json").write_text(json.dumps(changed))
    assert labels_beside(Run.open(root)) is None
    assert run_command(trunks) == 0
    assert "not that of the dictionaries beside it" in capsys.readouterr().err
