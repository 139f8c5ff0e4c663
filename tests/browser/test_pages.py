"""The pages, from disk: nothing complains, nothing leaves the folder, every view is reached,
numbers are those stored."""

from __future__ import annotations

import json
import math
import shutil
import struct
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.browser

ROUTES = (
    "",
    "flow",
    "community/3",
    "trunks",
    "site/L2",
    "site/L1.mlp",
    "L3/30",
    "L3/3",
    "L1.mlp/7",
    "L5/299",
    "graph/L3/30",
    "graph/L3/30?b=5&f=5&k=3&n=120",
    "search",
    "search?q=river",
    "search?q=script",
    "compare",
    "compare?f=L3/3,L4/6,L5/9",
    "lens",
    "lens/planted",
    "trace",
    "trace/planted-0a1b2c",
    "notes",
    "about",
    "try",
    "nothing/here",
    "L99/1",
)


def read_shard(world: Any, folder: Path, key: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A slow reader of the format, for comparison with what pages show."""
    import base64
    import gzip
    import json

    raw = gzip.decompress(base64.b64decode((folder / f"{key}.js").read_text().split('"')[3]))
    (length,) = struct.unpack("<I", raw[4:8])
    header = json.loads(raw[8 : 8 + length])
    columns = {}
    for entry in header["columns"]:
        count = math.prod(entry["shape"])
        dtype = np.dtype(entry["dtype"][0] + str(int(entry["dtype"][1:]) // 8))
        columns[entry["name"]] = np.frombuffer(
            raw, dtype, count, 8 + length + entry["offset"]
        ).reshape(entry["shape"])
    return header["json"], columns


@pytest.mark.parametrize("width", [390, 1440])
def test_every_view_opens_from_disk_without_a_complaint_or_a_foreign_request_or_overflow(
    page: Any, width: int
) -> None:
    page.load(width=width)
    for route in ROUTES:
        page.go(route)
        shown, room = page.js("return [document.documentElement.scrollWidth, innerWidth]")
        assert shown <= room, f"{route} is {shown} px wide on {width} px"
        assert page.text("h1"), route
    assert page.complaints() == []
    root = page.folder.as_uri()
    assert [url for url in page.requests() if not url.startswith((root, "data:", "blob:"))] == []


@pytest.mark.parametrize(
    ("width", "dark"), [(390, True), (1440, False)], ids=["phone-dark", "wide-light"]
)
def test_axe_finds_no_violation(page: Any, axe: str, width: int, dark: bool) -> None:
    page.load(width=width, dark=dark)
    page.js(axe)
    found = []
    for route in ROUTES:
        page.go(route)
        result = page.driver.execute_async_script(
            "const done = arguments[arguments.length - 1];"
            "axe.run(document, {resultTypes: ['violations']}).then((r) => done(r.violations), (e) "
            "=> done([{id: String(e), nodes: []}]))"
        )
        found += [
            (route, item["id"], [node["html"][:160] for node in item["nodes"][:3]])
            for item in result
        ]
    assert found == []


def test_a_person_clicks_through_every_view(page: Any) -> None:
    page.load()
    page.js(
        "document.querySelector('a.strip-column').dispatchEvent(new MouseEvent('click', {bubbles: "
        "true}))"
    )
    page.wait("return location.hash === '#/site/L0'")
    page.settle()
    page.click(".v-body a")
    assert page.js("return /^#\\/L0\\/\\d+$/.test(location.hash)")
    page.click("[role=tab][id$=decile]")
    assert "of activations" in page.text(".examples-section")
    page.click(".action.primary")
    page.wait("return document.querySelector('svg.graph .node')")
    page.settle()
    others = page.js(
        "return [...document.querySelectorAll('.node:not(.focus)')].map((n) => n.dataset.feature)"
    )
    page.js(
        "document.querySelector('.node:not(.focus)').dispatchEvent(new MouseEvent('click', "
        "{bubbles: true}))"
    )
    page.wait(
        "return document.querySelector('.graph-panel h2')?.textContent.includes(arguments[0])",
        others[0],
    )
    page.js(
        "[...document.querySelectorAll('.graph-panel button')].find((b) => "
        "b.textContent.includes('compare')).click()"
    )
    page.click("nav a[href='#/compare']")
    assert page.texts(".compare-column h2 a") == [others[0]]
    page.click("nav a[href='#/flow']")
    page.click("[aria-label=Communities] .v-body a")
    assert page.texts(".v-body .v-row")
    page.click("nav a[href='#/trunks']")
    page.click(".v-body a")
    page.wait("return document.querySelector('svg.graph .node')")
    page.click("nav a[href='#/about']")
    assert "synthetic-model" in page.text("main")
    assert page.complaints() == []


def test_the_card_shows_the_stored_numbers(page: Any, world: Any) -> None:
    latent = 30
    document, card = read_shard(world, page.folder, "sites/L3/cards/000")
    _, vocabulary = read_shard(world, page.folder, "vocab")
    _, corpus = read_shard(world, page.folder, "corpus/000")
    page.load(f"L3/{latent}")
    assert f"{card['count'][latent]} activations" in page.text(".facts-line")
    label = document["labels"][latent][0]
    assert label["text"] in page.text("table.labels")
    shares = page.texts(".token-table:first-of-type .share-number")
    expected = [
        s
        for s, n, t in zip(
            card["token_share"][latent],
            card["token_count"][latent],
            card["token"][latent],
            strict=True,
        )
        if n and t != 0xFFFFFFFF
    ]
    assert len(shares) == len(expected)
    for text, share in zip(shares, expected, strict=True):
        assert float(text.split()[0]) == pytest.approx(100 * share, rel=0.06)
    first = int(card["example_offset"][latent])
    row = int(card["example_row"][first])
    if row < len(corpus["token"]):
        token = int(corpus["token"][row])
        data = bytes(
            vocabulary["bytes"][vocabulary["offset"][token] : vocabulary["offset"][token + 1]]
        )
        peak = page.text(".example .peak")
        assert (
            token in (4, 5, 6, 7)
            or peak.strip() == data.decode().strip().replace("\n", "↵")
            or len(data) > 60
        )
    assert page.js("return document.querySelector('.example .peak').className.includes('a9')")


def test_second_opinions_stand_on_the_card_as_text(page: Any, world: Any) -> None:
    page.load("L2/30")
    assert "A sentence model says: its examples belong together 0.93." in page.text("main")
    row = page.texts("table.labels tbody tr")[-1]
    assert world.HOSTILE_TEXTS[0] in row
    assert "model stub" in row
    assert page.js("return window.hacked") is None
    page.go("L2/33")
    assert "sentence model" not in page.text("main")
    assert page.complaints() == []


def test_a_lens_has_a_page_a_sortable_table_and_columns_on_cards(page: Any, world: Any) -> None:
    page.load()
    page.js("[...document.querySelectorAll('nav a')].find(a => a.text === 'Lenses').click()")
    page.wait("return document.querySelector('main a[href=\"#/lens/planted\"]')")
    page.go("lens/planted")
    assert page.text("h1") == f"Depth {world.HOSTILE_TEXTS[1]}"
    assert page.js("return document.querySelector('.lens-figure img').naturalWidth") == 60
    assert "5 of 9 000" in page.text("main") or "of 9 000 rows" in page.text("main")
    column = "return [...document.querySelectorAll('.v-body .v-cell.number')].map(c => c.innerText)"
    sort = (
        "[...document.querySelectorAll('.v-sort')].find(b => b.innerText.includes('depth')).click()"
    )
    page.js(sort)
    shown = [float(text) for text in page.js(column) if text != "–"]
    assert shown == sorted(shown, reverse=True)
    page.js(sort)
    assert [float(text) for text in page.js(column) if text != "–"] == sorted(shown)
    links = page.js("return [...document.querySelectorAll('.v-body a')].map(a => a.hash)")
    assert "#/L2/3" in links
    assert "#/site/L2" in links
    assert not [link for link in links if "L99" in link], "what is not there is no link"
    page.go("L2/30")
    page.wait("return document.querySelector('.lens-columns')")
    said = page.text(".lens-columns")
    assert "0.25" in said
    assert world.HOSTILE_TEXTS[2] in said
    page.go("L2/31")
    page.wait("return !document.querySelector('[data-waiting]')")
    assert page.js("return document.querySelector('.lens-columns')") is None


def test_on_a_phone_labels_show_all_their_numbers_without_scrolling_and_lists_what_tells_them_apart(
    page: Any,
) -> None:
    page.load("L3/30", width=390)
    for selector in ("table.labels", ".examples"):
        inside, room = page.js(
            "const n = document.querySelector(arguments[0]); return [n.scrollWidth, "
            "n.parentElement.clientWidth]",
            selector,
        )
        assert inside <= room
    precision = page.js(
        "return document.querySelector('td[data-name=precision]').getBoundingClientRect().right"
    )
    assert 0 < precision <= 390
    page.go("trunks")
    assert page.js(
        "return [...document.querySelectorAll('.v-row .label-lead')].every((n) => n.offsetWidth "
        "=== 0)"
    )
    page.load("trunks", width=1440)
    assert page.js(
        "return [...document.querySelectorAll('.v-row .label-lead')].some((n) => n.offsetWidth > 0)"
    )


def test_the_space_before_a_word_is_not_shaded_and_no_text_is_lost(page: Any) -> None:
    page.load("L3/30")
    marks = page.texts(".examples mark.token")
    assert marks
    assert not [text for text in marks if text.startswith(" ") and text.strip()]
    whole = page.texts(".examples .example-text")[0]
    assert whole.strip("…") == "".join(page.texts(".examples > .example:first-child .token"))


def test_the_strip_and_its_table_twin_agree(page: Any, sizes: Any) -> None:
    page.load()
    page.click(".figure details.twin-details summary")
    rows = page.js("return document.querySelector('.twin table tbody').rows.length")
    assert rows == sizes.n_layers + 2 * len(range(1, sizes.n_layers, sizes.module_every))
    assert len(page.texts("a.strip-column")) == sizes.n_layers


def test_the_flow_overview_accounts_for_every_living_feature_of_the_stream(
    page: Any, world: Any, sizes: Any
) -> None:
    document, columns = read_shard(world, page.folder, "flow/trunks")
    manifest, _ = read_shard(world, page.folder, "manifest")
    page.load("flow")
    n_features, n_trunks = len(columns["site"]), len(columns["length"])
    lead = "".join(page.text(".lead").split())
    assert f"Eachofthe{n_features}livingfeatures" in lead
    assert f"oneof{n_trunks}trunks" in lead
    assert (
        f"{int((columns['length'] == sizes.n_layers).sum())}runthroughall{sizes.n_layers}layers"
        in lead
    )
    page.js("document.querySelectorAll('.figure details').forEach((d) => { d.open = true; })")
    page.wait("return document.querySelectorAll('.figure .twin table').length === 2")
    origins, turnover = page.js(
        "return [...document.querySelectorAll('.figure .twin table')].map((t) => "
        "[...t.rows].map((r) => [...r.cells].map((c) => c.textContent)))"
    )
    assert sum(int(row[1]) for row in origins[1:]) == n_features
    for i, name in enumerate(origins[0][2:], start=2):
        site = [s["short"] for s in manifest["sites"]].index(name)
        assert sum(int(row[i]) for row in origins[1:]) == int((columns["site"] == site).sum())
    ends = np.cumsum(columns["length"])
    first, last = columns["site"][ends - columns["length"]], columns["site"][ends - 1]
    for row in turnover[1:]:
        site = [s["short"] for s in manifest["sites"]].index(row[0])
        counted = np.bincount(columns["begin"][first == site], minlength=7)
        by_name = dict(zip(document["begins"], counted.tolist(), strict=True))
        order = ("first", "mlp", "attention", "both", "branch", "unexplained", "unread")
        assert [int(x) for x in row[1:8]] == [by_name[name] for name in order]
        assert [int(x) for x in row[8:11]] == [
            document["written"][name][site] for name in ("mlp", "attention", "both")
        ]
        counted = np.bincount(columns["end"][last == site], minlength=3)
        assert [int(x) for x in row[11:14]] == counted.tolist()


def test_a_bar_of_the_flow_overview_leads_to_the_list_of_its_trunks_and_on_to_a_feature(
    page: Any, world: Any
) -> None:
    _, columns = read_shard(world, page.folder, "flow/trunks")
    manifest, _ = read_shard(world, page.folder, "manifest")
    page.load("flow")
    page.wait("return document.querySelector('a.strip-column')")
    page.js(
        "document.querySelector('a.strip-column').dispatchEvent(new MouseEvent('click', {bubbles: "
        "true}))"
    )
    page.wait("return location.hash.startsWith('#/trunks?from=')")
    page.settle()
    short = page.js("return location.hash").split("=")[1]
    site = [s["short"] for s in manifest["sites"]].index(short)
    first = np.cumsum(columns["length"]) - columns["length"]
    mine = np.flatnonzero(columns["site"][first] == site)
    status = page.text("main [role=status]").replace("\u202f", "").replace("\u00a0", "")
    assert status.startswith(
        f"{len(mine)} trunks with {int(columns['length'][mine].sum())} features"
    )
    assert page.js(
        "return document.querySelector('.v-table').getAttribute('aria-rowcount')"
    ) == str(len(mine) + 1)
    page.click(".v-body .v-cell.layer a")
    assert page.js("return location.hash").startswith(f"#/{short}/")
    assert page.complaints() == []


def test_a_saved_figure_has_its_legend(page: Any) -> None:
    page.load("flow")
    page.wait("return document.querySelector('[aria-label=\"Save turnover as SVG\"]')")
    names = page.texts(".figure .legend li")
    assert len(names) >= 4
    saved = page.download(
        lambda: page.js("document.querySelector('[aria-label=\"Save turnover as SVG\"]').click()")
    )
    root = ElementTree.fromstring(saved.read_text())
    texts = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert [text for text in texts if text in names] == names
    bottom = sum(float(x) for x in root.get("viewBox").split()[1::2])
    assert all(
        float(node.get("y")) <= bottom for node in root.iter("{http://www.w3.org/2000/svg}text")
    )


def test_only_features_that_the_steer_stage_takes_have_its_command(page: Any, sizes: Any) -> None:
    page.load("L2/33")
    assert """featureflow steer --steer.features '["L2/33"]'""" in page.text(".steering")
    for feature in ("L1.mlp/7", f"L2/{sizes.n_latents - 1}"):
        page.go(feature)
        assert "residual stream that fire" in page.text(".steering")
        assert not page.texts(".steering .command")


def test_a_dead_latent_is_an_honest_empty_state(page: Any, sizes: Any) -> None:
    page.load(f"L2/{sizes.n_latents - 1}")
    assert "never active" in page.text("main")
    assert page.complaints() == []


def test_search_finds_labels_and_tokens(page: Any) -> None:
    page.load("search?q=harbour")
    page.wait("return document.querySelector('.search-results .v-body a')")
    assert all("harbour" in text for text in page.texts(".search-results .v-body .v-row .label"))
    assert any("harbour" in text for text in page.texts(".token-group h3"))
    page.js(
        "const i = document.querySelector('.search-box input'); i.value = 'L4/17'; "
        "i.form.requestSubmit()"
    )
    page.wait("return location.hash === '#/L4/17'")


def test_arrow_keys_walk_a_long_list_beyond_what_is_drawn(page: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    page.load("site/L2")
    page.js("document.querySelector('.v-body a').focus()")
    first = page.js("return document.activeElement.textContent")
    for _ in range(60):
        page.driver.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    assert (
        page.js("return document.activeElement.closest('.v-row').getAttribute('aria-rowindex')")
        == "62"
    )
    assert page.js("return document.activeElement.textContent") != first
    assert page.js("return document.querySelectorAll('.v-body .v-row').length") < 80


@pytest.mark.parametrize(
    ("key", "route", "said"),
    [
        ("manifest", "", "no atlas beside this page"),
        ("sites/L3/cards/000", "L3/3", "sites/L3/cards/000.js is missing"),
        ("flow/trunks", "trunks", "flow/trunks.js is missing"),
    ],
)
def test_a_missing_file_is_named(
    page_of: Any, atlas_folder: Path, tmp_path: Path, key: str, route: str, said: str
) -> None:
    folder = shutil.copytree(atlas_folder, tmp_path / "atlas")
    (folder / f"{key}.js").unlink()
    page = page_of(folder)
    page.load(route)
    assert said in page.text(".error")


def test_damaged_and_foreign_payloads_are_named(
    page_of: Any, world: Any, atlas_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(atlas_folder, tmp_path / "atlas")
    (folder / "sites/L3/labels.js").write_text('FF("sites/L3/labels","AAAA")\n')
    world.write_shard(folder, "sites/L2/labels", {"labels": []}, score=np.zeros(3, np.uint8))
    path = folder / "sites/L4/overview.js"
    path.write_text(path.read_text()[: path.stat().st_size // 2] + '")\n')
    page = page_of(folder)
    page.load("L3/3")
    assert "cannot be unpacked" in page.text(".error")
    page.go("site/L4")
    assert page.text(".error")


def test_an_atlas_of_another_version_is_refused_with_a_sentence(
    page_of: Any, world: Any, atlas_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(atlas_folder, tmp_path / "atlas")
    document, _ = read_shard(world, folder, "manifest")
    world.write_shard(folder, "manifest", {**document, "version": 3})
    page = page_of(folder)
    page.load()
    assert "version 3" in page.text(".error")
    assert "reads version 2" in page.text(".error")


def test_an_atlas_without_a_flow_graph_says_so(
    page_of: Any, world: Any, atlas_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(atlas_folder, tmp_path / "atlas")
    document, _ = read_shard(world, folder, "manifest")
    for site in document["sites"]:
        site["classes"] = {}
    world.write_shard(
        folder,
        "manifest",
        {**document, "has": {"flow": False, "communities": False, "trunks": False}},
    )
    shutil.rmtree(folder / "flow")
    for path in folder.glob("sites/*/flow.js"):
        path.unlink()
    page = page_of(folder)
    page.load()
    for route in ("", "flow", "trunks", "L3/30", "graph/L3/30", "compare?f=L3/3,L4/6"):
        page.go(route)
        assert page.text("h1") or page.text(".empty"), route
        assert not page.texts(".error"), route
    assert page.complaints() == []
    assert not [
        url for url in page.requests() if "/flow" in url.split("#")[0] or url.startswith("failed")
    ]


def test_a_trace_shows_its_bars_by_keyboard_and_as_a_table(page: Any) -> None:
    page.load("trace")
    assert page.js("return document.querySelector('main a[href=\"#/trace/planted-0a1b2c\"]')")
    page.go("trace/planted-0a1b2c")
    page.wait("return document.querySelectorAll('.supernode').length === 3")
    bars = page.texts(".supernode .bar-id")
    assert bars == ["0", "1≠", "2✕"]
    width = (
        "return +document.querySelectorAll('.supernode .body')[arguments[0]].getAttribute('width')"
    )
    assert page.js(width, 0) > page.js(width, 1) > page.js(width, 2)
    assert len(page.texts(".trace-edge")) == 1
    assert "Paris 0.80" in page.text(".trace-page")
    panel = page.text(".graph-panel")
    for words in ("name 0", "label", "L1 head 3", "Without it", "REAL EFFECT", "to S1"):
        assert words.lower() in panel.lower(), words
    page.js("document.querySelector('.supernode[tabindex=\"0\"]').focus()")
    page.js(
        "document.activeElement.dispatchEvent(new KeyboardEvent('keydown', "
        "{ key: 'ArrowRight', bubbles: true }))"
    )
    assert page.js("return document.activeElement.dataset.supernode") == "1"
    page.js(
        "document.activeElement.dispatchEvent(new KeyboardEvent('keydown', "
        "{ key: 'Enter', bubbles: true }))"
    )
    page.wait("return document.querySelector('.graph-panel h2').textContent.startsWith('S1')")
    assert "trust the removal" in page.text(".graph-panel")
    rows = page.js(
        "return [...document.querySelectorAll('.trace-page [aria-label^=Supernodes] tbody tr')]"
        ".map((row) => [...row.children].map((cell) => cell.innerText))"
    )
    assert [row[0] for row in rows] == ["S0", "S1", "S2", "S3"]
    assert (rows[1][4], rows[1][5], rows[1][9]) == ("2.00", "0.25", "≠ predicted")
    page.js("document.querySelector('[aria-label^=Supernodes] tr:nth-child(3) button').click()")
    page.wait("return document.querySelector('.graph-panel h2').textContent.startsWith('S2')")
    assert "without S0, with twice S2" in page.text(".trace-page")
    page.js(
        "const s = document.querySelector('.trace-page input[type=range]'); s.value = 4;"
        "s.dispatchEvent(new Event('input'))"
    )
    page.wait("return document.querySelectorAll('.supernode').length === 4")
    saved = page.download(
        lambda: page.js(
            "[...document.querySelectorAll('.trace-page .action')]"
            ".find((b) => b.textContent === 'Save JSON').click()"
        )
    )
    assert json.loads(saved.read_text())["y"] == 4
    assert page.complaints() == []
