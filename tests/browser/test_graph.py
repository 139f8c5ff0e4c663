"""The focus graph shows what was planted, walks by keyboard, and lives in its address."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def planted(world: Any, sizes: Any) -> dict[tuple[str, str], float]:
    """(source, target) -> cosine, from the generator with the same seed."""
    made = world.make_world(sizes)
    made.rng = __import__("numpy").random.default_rng(sizes.seed)
    _replay_texts(world, made)
    world.make_links(made)
    return {
        (f"{made.short(source)}/{s}", f"{made.short(target)}/{t}"): float(c)
        for target, parts in made.links.items()
        for source, targets, sources, cosines, _ in parts
        for s, t, c in zip(sources, targets, cosines, strict=True)
    }


def _replay_texts(world: Any, made: Any) -> None:
    """Draw the random numbers that writing the texts draws, so that links come out the same."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        world.write_texts(Path(folder), made)


@pytest.fixture(scope="module")
def focus(planted: dict[tuple[str, str], float]) -> str:
    """A feature of L3 with links on both sides, two hops back."""
    into = {target for _, target in planted}
    ends = {source for source, target in planted if source in into}
    return next(
        f
        for f in sorted(ends)
        if f.startswith("L3/") and any(s in into for s, t in planted if t == f)
    )


def graph(page: Any, route: str) -> tuple[set[str], set[tuple[str, str]]]:
    page.load(route)
    page.wait("return document.querySelector('svg.graph .node')")
    page.settle()
    page.click(".graph-page details.twin-details summary")
    rows = page.js(
        "return [...document.querySelectorAll('.twin tbody tr')].map((r) => "
        "[r.cells[0].textContent, r.cells[2].textContent])"
    )
    nodes = page.js("return [...document.querySelectorAll('.node')].map((n) => n.dataset.feature)")
    return set(nodes), {tuple(row) for row in rows}


def test_shown_links_are_planted_links_and_all_strong_ones_between_shown_features_are_shown(
    page: Any, planted: dict[tuple[str, str], float], focus: str
) -> None:
    nodes, links = graph(page, f"graph/{focus}?b=3&f=2&k=3&t=0")
    assert len(nodes) > 5
    assert links == {pair for pair in planted if set(pair) <= nodes}
    assert page.js("return document.querySelectorAll('.edge').length") == len(links)


def test_ancestors_within_hops_are_found(
    page: Any, planted: dict[tuple[str, str], float], focus: str
) -> None:
    nodes, _ = graph(page, f"graph/{focus}?b=2&f=0&k=8&t=0&n=300")
    wanted = {focus}
    for _ in range(2):
        wanted |= {source for source, target in planted if target in wanted}
    assert nodes == wanted


def test_limits_hold(page: Any, planted: dict[tuple[str, str], float], focus: str) -> None:
    nodes, links = graph(page, f"graph/{focus}?b=5&f=5&k=8&t=0.6&n=20")
    assert len(nodes) <= 20
    assert all((planted[pair] - 0.2) / 0.8 >= 0.6 - 1e-3 for pair in links)
    _, mutual = graph(page, f"graph/{focus}?b=3&f=3&m=1")
    assert mutual <= set(planted)
    assert all(
        text == "yes"
        for text in page.js(
            "return [...document.querySelectorAll('.twin tbody tr')].map((r) => "
            "r.cells[10].textContent)"
        )
    )


def test_keys_walk_along_links_and_enter_opens_the_card(
    page: Any, planted: dict[tuple[str, str], float], focus: str
) -> None:
    from selenium.webdriver.common.keys import Keys

    graph(page, f"graph/{focus}?b=2&f=2&k=3&t=0")
    page.js("document.querySelector('.node[tabindex=\"0\"]').focus()")
    at = focus
    for key, forward in ((Keys.ARROW_LEFT, False), (Keys.ARROW_RIGHT, True)):
        page.driver.switch_to.active_element.send_keys(key)
        after = page.js("return document.activeElement.dataset.feature")
        pair = (at, after) if forward else (after, at)
        if after == at:
            assert not [p for p in planted if p[1 - forward] == at]
            continue
        assert pair in planted
        assert page.js("return document.querySelectorAll('.node[tabindex=\"0\"]').length") == 1
        at = after
    page.driver.switch_to.active_element.send_keys(Keys.ENTER)
    page.wait("return location.hash === arguments[0]", f"#/{at}")


def test_a_stub_opens_the_links_it_counts(page: Any, focus: str) -> None:
    before, _ = graph(page, f"graph/{focus}?b=1&f=1&k=1&t=0")
    page.js(
        "document.querySelector('.stub').dispatchEvent(new MouseEvent('click', {bubbles: true}))"
    )
    page.wait("return document.querySelectorAll('.node').length > arguments[0]", len(before))
    assert page.js("return location.hash.includes('x=L')")


def test_the_address_alone_brings_the_same_graph_back(page: Any, focus: str) -> None:
    graph(page, f"graph/{focus}?b=1&f=1&k=1")
    for label, value in (("back", 3), ("onward", 2), ("links each", 3)):
        page.js(
            "const i = document.querySelector(`input[aria-label='${arguments[0]}']`); i.value = "
            "arguments[1]; i.dispatchEvent(new Event('input'))",
            label,
            value,
        )
        page.settle()
    page.wait("return location.hash.includes('k=3')")
    page.settle()
    address = page.js("return location.hash")
    shown = page.js(
        "return [...document.querySelectorAll('.node')].map((n) => [n.dataset.feature, "
        "n.getAttribute('transform')])"
    )
    page.load(address.removeprefix("#/"))
    page.wait("return document.querySelector('svg.graph .node')")
    page.settle()
    assert (
        page.js(
            "return [...document.querySelectorAll('.node')].map((n) => [n.dataset.feature, "
            "n.getAttribute('transform')])"
        )
        == shown
    )


def test_hovering_lights_the_paths_through_a_feature(
    page: Any, planted: dict[tuple[str, str], float], focus: str
) -> None:
    _, links = graph(page, f"graph/{focus}?b=3&f=2&k=3&t=0")
    page.js(
        "document.querySelector('.node.focus rect').dispatchEvent(new PointerEvent('pointerover', "
        "{bubbles: true}))"
    )
    lit = set(
        page.js("return [...document.querySelectorAll('.node.on')].map((n) => n.dataset.feature)")
    )
    back, onward = {focus}, {focus}
    for _ in range(10):
        back |= {source for source, target in links if target in back}
        onward |= {target for source, target in links if source in onward}
    assert lit == back | onward


def test_c_puts_the_chosen_feature_into_the_compare_tray_and_takes_it_out(page: Any) -> None:
    page.load("graph/L3/30")
    page.wait("return document.querySelector('svg.graph .node')")
    page.js("document.querySelector('.node.focus').focus()")
    feature = page.js("return document.activeElement.dataset.feature")
    for expected in ([feature], []):
        page.driver.switch_to.active_element.send_keys("c")
        stored = (
            "return Object.entries(localStorage).filter(([k]) => "
            "k.endsWith(':compared')).flatMap(([, v]) => JSON.parse(v))"
        )
        assert page.js(stored) == expected
        assert page.js("return location.hash").startswith("#/graph/")
