"""Every token, title, label and note is data: it is shown as text and executes nothing."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest

pytestmark = pytest.mark.browser


def assert_unharmed(page: Any, route: str) -> None:
    assert page.js("return window.hacked") is None, route
    assert (
        page.js(
            "return document.querySelectorAll('main script, main img, main [onerror], main "
            "[onmouseover]').length"
        )
        == 0
    ), route
    assert page.complaints() == [], route


def test_hostile_labels_tokens_and_titles_are_shown_as_text(page: Any, world: Any) -> None:
    page.load()
    for latent, text in enumerate(world.HOSTILE_TEXTS):
        page.go(f"L2/{latent}")
        if text.isprintable() and "\u202e" not in text:
            assert text in page.text("h1")
        assert_unharmed(page, f"L2/{latent}")
    for route in (
        "flow",
        "trunks",
        "site/L2",
        "graph/L2/1",
        "compare?f=L2/0,L2/1,L2/2",
        "search?q=script",
        "community/0",
    ):
        page.go(route)
        page.js(
            "for (const e of document.querySelectorAll('main *')) e.dispatchEvent(new "
            "MouseEvent('mouseover', {bubbles: true}))"
        )
        assert_unharmed(page, route)


def test_hostile_findings_are_shown_as_text(page: Any, world: Any) -> None:
    """The figure is an image, in which no script runs; all else is text."""
    page.load()
    page.go("lens/planted")
    assert world.HOSTILE_TEXTS[0] in page.text("main")
    assert page.js("return window.hacked") is None
    harm = "main script, main [onerror], main [onmouseover], main [onload], main svg script"
    assert page.js(f"return document.querySelectorAll('{harm}').length") == 0
    assert page.js(
        "return [...document.querySelectorAll('main img')].map(i => i.src.slice(0, 18))"
    ) == ["data:image/svg+xml"]
    assert page.complaints() == []
    page.go("lens")
    assert world.HOSTILE_TEXTS[1] in page.text("main")
    assert_unharmed(page, "lens")
    page.go("trace/planted-0a1b2c")
    assert world.HOSTILE_TEXTS[0] in page.text("main")
    assert_unharmed(page, "trace")


def test_hostile_addresses_are_shown_as_text(page: Any) -> None:
    page.load()
    for route in (
        "search?q=<img src=x onerror=window.hacked=1>",
        "<script>window.hacked=1</script>",
        "site/<img src=x>",
        "graph/__proto__/1",
        "compare?f=<b>,L1/2",
        "community/constructor",
        "L1/2?tab=<script>&w=9999",
        "%E0%A4%A",
        "graph/L1/3?b=-5&n=99999&x=<x>,L0/1&s=__proto__",
    ):
        page.go(route)
        assert_unharmed(page, route)
        assert page.js("return document.querySelectorAll('.node').length") <= 360


def test_directions_and_separators_are_visible_signs(page: Any) -> None:
    page.load("L2/5")
    assert "⟨U+2028⟩" in page.text("h1")
    page.go("L2/6")
    assert "⟨U+202E⟩" in page.text("h1")
    assert "\u202e" not in page.text("body")


def test_a_megabyte_token_does_not_reach_the_page(page: Any, world: Any) -> None:
    page.load()
    page.go("L2/0")  # its strongest token is the last of the vocabulary: a million letters
    assert "xxxx" in page.text(".token-table")
    assert page.js("return document.body.innerText.length") < 60_000
    assert (
        page.js(
            "return Math.max(...[...document.querySelectorAll('main *')].map((e) => Math.max(0, "
            "...[...e.attributes].map((a) => a.value.length))))"
        )
        < 5000
    )


def test_bytes_of_one_character_are_joined_and_broken_ones_are_named(page: Any) -> None:
    page.load("search?q=surrogate")
    page.wait("return document.querySelector('.token-group h3')")
    assert "lone\\xED\\xA0\\x80surrogate" in page.text(".token-group h3")
    page.go("L2/7")
    text = "".join(page.texts(".examples .token"))
    page.click("[role=tab][id$=uniform]")
    text += "".join(page.texts(".examples .token"))
    assert "Ġ" not in text
    assert "\ufffd" not in text


def test_a_saved_figure_is_well_formed_and_holds_no_script(page: Any) -> None:
    page.load("graph/L2/1?b=4&f=3&k=3")
    page.wait("return document.querySelector('svg.graph .node')")
    path = page.download(lambda: page.click("button[aria-label^='Save'][aria-label$='SVG']"))
    root = ElementTree.parse(path).getroot()
    tags = {element.tag.split("}")[1] for element in root.iter()}
    assert "script" not in tags
    assert not [
        name for element in root.iter() for name in element.attrib if name.lower().startswith("on")
    ]
    assert any("L2/1" in (element.text or "") for element in root.iter())


def test_a_saved_table_keeps_its_shape_whatever_the_cells_hold(page: Any) -> None:
    page.load("site/L2?sort=latent&down=0")
    path = page.download(lambda: page.click("button[aria-label$='TSV']"))
    lines = path.read_text("utf-8").split("\n")
    assert lines[-1] == ""
    width = len(lines[0].split("\t"))
    assert {len(line.split("\t")) for line in lines[:-1]} == {width}
    assert lines[11].startswith("L2/10\tactive on a\\tb\\nc\\r\\n")


def test_notes_go_out_to_a_file_and_come_back(page: Any) -> None:
    page.load("L2/1")
    page.js(
        "const [a, b] = document.querySelectorAll('.note input, .note textarea'); "
        "document.querySelector('.note').open = true;"
        "a.value = '<b>mine</b>'; a.dispatchEvent(new Event('input')); b.value = 'because "
        "\\ud800'; b.dispatchEvent(new Event('input'))"
    )
    page.go("notes")
    assert "<b>mine</b>" in page.text("main")
    path = page.download(
        lambda: page.js(
            "[...document.querySelectorAll('button')].find((b) => b.textContent.startsWith('Save "
            "notes')).click()"
        )
    )
    saved = json.loads(path.read_text("utf-8"))
    assert [(note["feature"], note["label"]) for note in saved["notes"]] == [
        ("L2/1", "<b>mine</b>")
    ]
    page.js("localStorage.clear()")
    page.load("notes")
    saved["notes"] += [
        {"feature": "L99/1", "label": "nowhere"},
        {"feature": "__proto__", "label": "x"},
        7,
    ]
    path.write_text(json.dumps(saved))
    page.driver.find_element("id", "notes-file").send_keys(str(path))
    page.wait("return document.querySelector('main').innerText.includes('1 note read')")
    assert page.text("main").count("no such feature") == 3
    assert "<b>mine</b>" in page.text("table")
    assert_unharmed(page, "notes")
    page.go("L2/1")
    assert "<b>mine</b>" in page.text("h1")


def test_a_file_that_is_no_notes_file_is_refused_with_a_reason(page: Any, tmp_path: Any) -> None:
    page.load("notes")
    for content, said in (("not json", "is not JSON"), ('{"kind": "else"}', "not a notes file")):
        path = tmp_path / "notes.json"
        path.write_text(content)
        page.driver.find_element("id", "notes-file").send_keys(str(path))
        page.wait("return document.querySelector('main').innerText.includes(arguments[0])", said)
