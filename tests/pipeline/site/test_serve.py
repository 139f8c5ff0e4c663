"""The live server: what it says of a typed text is what the dictionaries do; and what it
refuses."""

from __future__ import annotations

import http.client
import json
import threading

import pandas as pd
import pytest
import torch

from featureflow.errors import UserError
from pipeline.run import Run
from pipeline.serve.atlas_server import make_server
from pipeline.serve.live import MAX_TOKENS, LiveAtlas
from pipeline.trace.document import document_of
from sae import load_sae

TEXT = "The river runs to the sea."


@pytest.fixture(scope="module")
def live(small_run) -> LiveAtlas:
    return LiveAtlas(Run.open(small_run.root))


@pytest.fixture
def server(live):
    made, address = make_server(live, port=0, wait_s=0.3)
    with made.running():
        yield made.port, address.split("token=")[1]


def ask(server, method: str, path: str, body: object = None, **headers: str) -> tuple[int, str]:
    port, token = server
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    text = body if isinstance(body, str) or body is None else json.dumps(body)
    connection.request(
        method,
        path,
        text,
        {"X-Atlas-Token": token, **{k.replace("_", "-"): v for k, v in headers.items()}},
    )
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_a_typed_text_is_answered_with_what_every_dictionary_does_on_it(small_run, live, server):
    status, text = ask(server, "POST", "/api/text", {"text": TEXT})
    records = [json.loads(line) for line in text.splitlines()]
    assert status == 200
    ids = records[0]["tokens"]
    assert ids == [live.model.tokenizer.bos_id, *live.model.tokenizer.encode(TEXT)]
    assert records[-1] == {"done": True}
    for record in (r for r in records if "site" in r):
        site = list(live.saes)[record["site"]]
        z = load_sae(small_run.train.path / "dictionaries" / site.short).encode(
            live.model.activations(torch.tensor([ids]), [site])[site][0].float()
        )
        found = torch.zeros_like(z)
        found[record["at"], record["latent"]] = torch.tensor(record["value"])
        z[0] = 0
        assert torch.allclose(found, z, atol=1e-3)


def test_a_link_is_live_where_both_its_ends_fire(small_run, live, server):
    _, text = ask(server, "POST", "/api/text", {"text": TEXT})
    records = [json.loads(line) for line in text.splitlines()]
    shorts = [site.short for site in live.saes]
    fires = {
        (r["site"], f, t)
        for r in records
        if "site" in r
        for f, t in zip(r["latent"], r["at"], strict=True)
    }
    edges = pd.read_parquet(small_run.link.path / "edges.parquet").query("kept")
    known = {
        (f"{e.source_site}/{e.source_latent}", f"{e.target_site}/{e.target_latent}")
        for e in edges.itertuples()
    }
    expected = {
        (source, target, t)
        for (s, f, t) in fires
        for (s2, g, t2) in fires
        if t == t2 and (source := f"{shorts[s]}/{f}", target := f"{shorts[s2]}/{g}") in known
    }
    links = next(r["links"] for r in records if "links" in r)
    assert {(f"{shorts[s]}/{f}", f"{shorts[t]}/{g}", at) for t, g, s, f, at in links} == expected
    assert expected


def test_steering_streams_both_arms_and_leaves_the_model_as_it_was(live, server):
    body = {"features": ["L1/3"], "prompt": "A", "dose": 0.01, "n_new_tokens": 4}
    before = live.model.logits(torch.tensor([[0, 5, 6]]))
    status, text = ask(server, "POST", "/api/steer", body)
    records = [json.loads(line) for line in text.splitlines()]
    assert status == 200, text
    assert {r["arm"] for r in records if "arm" in r} == {"unsteered", "steered"}
    assert records[-1] == {"done": True}
    assert torch.equal(live.model.logits(torch.tensor([[0, 5, 6]])), before)


def test_a_trace_grows_and_is_the_one_of_the_library(live, server):
    status, text = ask(server, "POST", "/api/trace", {"prompt": TEXT})
    records = [json.loads(line) for line in text.splitlines()]
    assert status == 200, text
    assert records[-1] == {"done": True}
    predicted, removed, whole = (r["trace"] for r in records if "trace" in r)
    assert predicted["supernodes"][0]["removed"] is None
    assert removed["supernodes"][0]["removed"] is not None
    expected = document_of(live.run.trace(TEXT), live.run, TEXT)
    for mine, theirs in zip(whole["supernodes"], expected["supernodes"], strict=True):
        assert mine["name"] == theirs["name"]
        assert mine["removed"] == pytest.approx(theirs["removed"], abs=1e-5)
    node = whole["supernodes"][0]
    body = {
        "prompt": TEXT,
        "token": node["token"],
        "features": [m["feature"] for m in node["members"]],
    }
    status, text = ask(server, "POST", "/api/trace/edit", {**body, "factor": 0.0})
    changed = json.loads(text.splitlines()[0])["changed"]
    assert changed["kl"] == pytest.approx(node["kl"], abs=1e-4)
    status, text = ask(server, "POST", "/api/trace/plan", body)
    plan = json.loads(json.loads(text.splitlines()[0])["plan"])
    assert {n["at"] for n in plan["nodes"]} == set(body["features"])


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/api/trace", {"prompt": ""}, 400),
        ("/api/trace", {"prompt": "word " * 2 * MAX_TOKENS}, 400),
        ("/api/trace", {"prompt": TEXT, "answer": "two words"}, 400),
        ("/api/trace/edit", {"prompt": TEXT, "features": [], "token": 1}, 400),
        ("/api/trace/edit", {"prompt": TEXT, "features": ["L0/1"], "token": 99}, 400),
        ("/api/trace/edit", {"prompt": TEXT, "features": ["L0/1"], "token": 1, "factor": 1e9}, 400),
        ("/api/trace/plan", {"prompt": TEXT, "features": ["L0/47"], "token": 1}, 400),
        ("/api/text", {"text": ""}, 400),
        ("/api/text", {"text": "word " * 2 * MAX_TOKENS}, 400),
        ("/api/text", {"text": 5}, 400),
        ("/api/text", "not json", 400),
        ("/api/text", "[]", 400),
        ("/api/text", '"' + "x" * 70_000 + '"', 400),
        ("/api/steer", {"features": ["L9/1"], "prompt": "A"}, 400),
        ("/api/steer", {"features": [], "prompt": "A"}, 400),
        ("/api/steer", {"features": ["L1/3"], "prompt": "A", "n_new_tokens": 10**6}, 400),
        ("/api/other", {}, 404),
    ],
)
def test_bad_requests_are_answered_with_a_sentence(server, path, body, status):
    found, text = ask(server, "POST", path, body)
    assert found == status
    assert len(text) > 5
    assert "Traceback" not in text


def test_strangers_are_refused(server):
    assert ask(server, "GET", "/api/health", X_Atlas_Token="wrong")[0] == 401
    assert ask(server, "POST", "/api/text", {"text": "a"}, X_Atlas_Token="")[0] == 401
    assert ask(server, "GET", "/index.html", Host="evil.example")[0] == 403
    assert ask(server, "GET", "/api/health")[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "/../manifest.json",
        "/%2e%2e/manifest.json",
        "/..%2f..%2fetc/passwd",
        "//etc/passwd",
        "/sites",
    ],
)
def test_no_path_leaves_the_site_folder(server, path):
    assert ask(server, "GET", path)[0] == 404


def test_the_site_is_served(server):
    status, text = ask(server, "GET", "/manifest.js")
    assert status == 200
    assert text.startswith('FF("manifest"')


def test_steering_is_stopped_while_its_strength_is_being_found(live):
    records = live.steer(["L1/5"], "one", dose=0.2, n_new_tokens=4)
    assert "status" in next(records)
    live.stop()
    assert list(records) == []
    assert list(live.steer(["L1/5"], "one", dose=0.2, n_new_tokens=1))[-1] == {"done": True}


def test_links_beyond_the_most_that_are_sent_are_said_to_be_cut(live, monkeypatch):
    links = next(record for record in live.read_text(TEXT) if "links" in record)
    assert not links["cut"]
    assert len(links["links"]) > 2
    monkeypatch.setattr("pipeline.serve.live.MAX_LINKS", 2)
    cut = next(record for record in live.read_text(TEXT) if "links" in record)
    assert cut == {"links": links["links"][:2], "cut": True}


def test_one_request_at_a_time(live, server, monkeypatch):
    entered, release = threading.Event(), threading.Event()

    def slow(text: str):
        entered.set()
        release.wait(20)
        yield {"done": True}

    monkeypatch.setattr(live, "read_text", slow)
    first = threading.Thread(target=ask, args=(server, "POST", "/api/text", {"text": "a"}))
    first.start()
    assert entered.wait(20)
    assert ask(server, "POST", "/api/text", {"text": "b"})[0] == 429
    release.set()
    first.join()
    assert ask(server, "POST", "/api/text", {"text": "c"})[0] == 200


def test_elsewhere_every_file_needs_the_token_which_stays_in_a_cookie(live):
    made, address = make_server(live, host="0.0.0.0", port=0)
    token = address.split("token=")[1]

    def get(path: str, **headers: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", made.port, timeout=60)
        connection.request("GET", path, headers={"Host": "atlas.example", **headers})
        answer = connection.getresponse()
        answer.read()
        return answer.status, answer.headers.get("Set-Cookie") or ""

    with made.running():
        assert get("/")[0] == 401
        assert get("/manifest.js")[0] == 401
        assert get("/?token=wrong")[0] == 401
        status, cookie = get(f"/?token={token}")
        assert status == 200
        assert "HttpOnly" in cookie
        assert "SameSite=Strict" in cookie
        assert get("/manifest.js", Cookie=f"other=1; {cookie.split(';')[0]}")[0] == 200
        assert (
            get("/api/health", Cookie=cookie.split(";")[0])[0] == 401
        )  # the model asks for the header


def test_a_taken_port_is_said_so(live, server):
    with pytest.raises(UserError, match="cannot listen"):
        make_server(live, port=server[0])
