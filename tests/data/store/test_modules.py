"""A store of any module holds what its submodules gave, a row an item or a place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from data.store import (
    ActivationStore,
    DocumentRow,
    SiteLayout,
    StoreLayout,
    store_modules,
    write_activations,
)
from featureflow.errors import UserError
from featureflow.sites import named_site, parse_feature, parse_site

PNG = "data:image/png;base64,iVBORw0KGgo="


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(3, 5, 3, padding=1)
    )


def test_maps_become_rows_of_the_smallest_map_with_features_last(tmp_path):
    model, images = convolutions(), torch.randn(10, 1, 8, 8)
    items = [DocumentRow(title=f"image {i}", label="even", image=PNG) for i in range(10)]
    store = store_modules(
        tmp_path / "s.zarr",
        model,
        images.split(3),
        sites=["0", "2"],
        items=items,
        validation_fraction=0.3,
    )
    assert [site.short for site in store.sites] == ["M0.0", "M1.2"]
    assert [store.width(site) for site in store.sites] == [3, 5]
    assert store.n_rows == 160
    assert store.validation_start == 7 * 16
    with torch.no_grad():
        first, last = model[0](images), model(images)
    place = (6 * 16) + 4 * 2 + 3  # image 6, row 2, column 3 of 4 x 4
    at_last = store.read("M1.2", place, place + 1)[0]
    np.testing.assert_allclose(at_last, last[6, :, 2, 3], rtol=1e-5)
    averaged = first[6, :, 4:6, 6:8].mean((1, 2))
    np.testing.assert_allclose(store.read("0", place, place + 1)[0], averaged, rtol=1e-5, atol=1e-6)
    tokens = store.tokens()
    assert tokens.document[place] == 6
    assert store.provenance["vocabulary"][tokens.id[place]] == " 3,4"
    assert tokens.documents[6] == items[6]
    assert not tokens.flags.any()
    assert not any(module._forward_hooks for module in model.modules())


class Encoder(nn.Module):
    """Takes its batch by name, as a sentence encoder does."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.out = nn.Linear(6, 4)

    def forward(self, input_ids, attention_mask):
        return (self.out(self.embed(input_ids)),)


def test_padding_is_left_out_and_ids_name_the_rows(tmp_path):
    model = Encoder()
    ids = torch.tensor([[3, 4, 5], [7, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    store = store_modules(tmp_path / "s.zarr", model, [batch], sites=["embed", "out"])
    tokens = store.tokens()
    assert tokens.id.tolist() == [3, 4, 5, 7]
    assert tokens.document.tolist() == [0, 0, 0, 1]
    assert tokens.position.tolist() == [0, 1, 2, 0]
    expected = model.out(model.embed(torch.tensor([3, 4, 5, 7]))).detach()
    np.testing.assert_allclose(store.read("out", 0, 4), expected, rtol=1e-5, atol=1e-6)


def test_one_row_an_item_is_named_by_its_item(tmp_path):
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    store = store_modules(tmp_path / "s.zarr", model, torch.randn(9, 4).split(4), sites=["0", "1"])
    assert store.tokens().id.tolist() == store.tokens().document.tolist() == list(range(9))
    assert store.provenance["vocabulary"] is None


def test_what_cannot_be_stored_is_refused_with_everything_that_is_wrong(tmp_path):
    model, images = convolutions(), [torch.randn(2, 1, 8, 8)]
    with pytest.raises(UserError) as caught:
        store_modules(tmp_path / "a.zarr", model, images, sites=["conv", "0", "head"])
    assert [problem.where for problem in caught.value.problems] == ["conv", "head"]
    assert "0, 1, 2" in str(caught.value)
    mixed = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(108, 2))
    with pytest.raises(UserError, match="do not have the same rows"):
        store_modules(tmp_path / "b.zarr", mixed, images, sites=["0", "2"])
    with pytest.raises(UserError, match="no batches"):
        store_modules(tmp_path / "c.zarr", model, [], sites=["0"])
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    "image", ["javascript:alert(1)", "data:image/svg+xml;base64,AAAA", "x" * 9]
)
def test_only_small_pictures_as_inline_data_are_kept(image):
    with pytest.raises(UserError, match="not a small picture"):
        DocumentRow(title="a", image=image)
    with pytest.raises(UserError, match="not a small picture"):
        DocumentRow(image=PNG + "A" * 20_000)


def test_a_named_site_has_one_name_and_a_place_in_the_order():
    site = named_site(3, "blocks.3.mlp")
    assert parse_site(site.name) == parse_site(site.short) == parse_site("M3.blocks.3.mlp") == site
    assert parse_feature("M3.blocks.3.mlp/17").site == site
    assert named_site(2, "z") < site < named_site(10, "a")
    with pytest.raises(UserError, match="is not a site"):
        parse_site("L3.conv1")


def test_sites_of_a_transformer_are_not_renamed_by_names_beside_them(tmp_path):
    layout = StoreLayout(
        sites=(SiteLayout(name="blocks.3.hook_resid_post", width=2), SiteLayout(name="p", width=2)),
        dtype="float32",
        n_rows=None,
        n_context=1,
        shard_rows=4,
        chunk_rows=4,
    )
    rows = {site.name: np.ones((4, 2), np.float32) for site in layout.sites}
    write_activations(tmp_path / "s.zarr", [(rows, None)], layout=layout)
    store = ActivationStore.open(tmp_path / "s.zarr")
    assert [site.short for site in store.sites] == ["L3"]
    assert not store.is_of_any_module
