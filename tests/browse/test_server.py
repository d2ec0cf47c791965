"""The page is for this machine only, shows texts as text, and loads nothing from elsewhere."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from starlette.testclient import TestClient

from saeguard.browse.server import app
from saeguard.browse.site import Site
from saeguard.hf.on_prompt import on_prompt
from saeguard.hf.texts import make_turn
from tests.latents.made import Made

VIEWS = ["/", "/?q=1", "/?q=a", "/?q=loud", "/latent/1", "/latent/0", "/latent/63",
         "/feature/loud", "/policy/noise.own", "/events", "/event/0", "/event/1",
         "/event/2"]  # fmt: skip


class Elements(HTMLParser):
    """Collects the elements of a page with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep an element."""
        self.found.append((tag, dict(attrs)))


def elements(html: str) -> list[tuple[str, dict[str, str | None]]]:
    """Return the elements of a page."""
    parser = Elements()
    parser.feed(html)
    return parser.found


@pytest.mark.parametrize("view", VIEWS)
def test_views_show_hostile_texts_as_text(client: TestClient, view: str) -> None:
    """Only our own script and no inline one, no handler, no style, nothing hidden or turned."""
    answer = client.get(view)
    assert answer.status_code == 200
    found = elements(answer.text)
    assert [attrs for tag, attrs in found if tag == "script"] == [
        {"src": "/static/app.js", "defer": None}
    ]
    assert not any(tag in {"img", "style", "iframe", "object"} for tag, _ in found)
    for _, attrs in found:
        assert not any(name.startswith("on") or name == "style" for name in attrs)
        for name in ("href", "src", "action"):
            value = attrs.get(name)
            assert value is None or value.startswith(("/", "#", "data:,"))
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00\x1b]", answer.text)
    assert len(answer.text) < 400_000


def test_texts_and_their_activations_are_there(client: TestClient, site: Site) -> None:
    """A latent's page holds its examples, and hostile ones are escaped."""
    densest = client.get("/").text
    assert "&lt;script&gt;" in client.get("/policy/noise.own").text
    latent = int(re.findall(r'href="/latent/(\d+)"', densest)[0])
    page = client.get(f"/latent/{latent}").text
    stats = site.index.stats(latent)
    assert f"{stats.tokens:,} tokens, {stats.texts:,} texts" in page
    assert page.count("<mark") >= 20
    assert "Strongest" in page
    assert "&lt;" in page


def test_a_latent_shows_who_uses_it(client: TestClient) -> None:
    """Feature and policy of a latent; neighbours with their cosine; the other way, too."""
    page = client.get("/latent/1").text
    assert 'href="/feature/loud"' in page
    assert 'href="/policy/noise.own"' in page
    assert "Neighbours by decoder" in page
    feature = client.get("/feature/loud").text
    assert 'href="/latent/1"' in feature
    assert "data-groups" in feature
    assert "AUROC" in feature


def test_search(client: TestClient) -> None:
    """By number the latent, by token those that make it likelier, by name the feature."""
    assert re.findall(r'class="n" href="/latent/(\d+)"', client.get("/?q=17").text) == ["17"]
    assert 'href="/feature/loud"' in client.get("/?q=loud").text
    assert 'href="/feature/loud"' not in client.get("/?q=zzzz").text
    assert "No latent has this number" in client.get("/?q=zzzz").text
    assert "&lt;b&gt;" in client.get("/", params={"q": "<b>"}).text


def test_what_is_not_there_says_so(client: TestClient) -> None:
    """404 with a page, escaped."""
    for path in ("/latent/64", "/feature/none", "/policy/none", "/event/9", "/none/<b>"):
        answer = client.get(path)
        assert answer.status_code == 404
        assert "<h1>Not there</h1>" in answer.text
        assert "<b>" not in answer.text
    assert "the SAE has 0 to 63" in client.get("/latent/64").text


def test_headers_keep_the_page_to_itself(client: TestClient) -> None:
    """No inline script or style may run, no other page may frame or read it."""
    for path in ("/", "/static/app.js", "/latent/99999", "/nothing"):
        policy = client.get(path).headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400


def test_a_text_is_read(client: TestClient, made: Made) -> None:
    """Tokens with the latents that fire on them, as the model reads them."""
    asked = {"prompt": "ab#", "completion": "<b>c", "latent": 1}
    answer = client.post("/api/try", json=asked).json()
    text = make_turn("t", made.lm.tokenizer, "ab#", "<b>c")
    found = on_prompt(made.lm, made.info, made.features, text)
    assert len(answer["tokens"]) == len(text.tokens)
    assert "".join(t["text"] for t in answer["tokens"]).endswith("<b>c")
    for at, token in enumerate(answer["tokens"]):
        own = found.value[(found.token == at) & (found.latent == 1)]
        assert token["value"] == pytest.approx(float(own[0]) if len(own) else 0.0, abs=1e-3)
        assert bool(token["step"]) == bool(len(own))
        assert token["looked"] == bool(found.looked[at])


def test_only_this_page_may_ask(client: TestClient, site: Site) -> None:
    """Another site's page, a form, a huge or wrong body: refused, with what is wrong."""
    asked = {"prompt": "a"}
    origins = {"http://evil.example": 403, "http://127.0.0.1": 200}
    for origin, status in origins.items():
        assert client.post("/api/try", json=asked, headers={"origin": origin}).status_code == status
    form = client.post(
        "/api/try", content=b'{"prompt": "a"}', headers={"content-type": "text/plain"}
    )
    assert form.status_code == 403
    assert client.post("/api/try", json={"prompt": "a" * 1_000_000}).status_code == 413
    for wrong, why in (
        ({"prompt": 3}, "prompt: "),
        ({"prompt": "a", "more": 1}, "more: "),
        ({"prompt": ""}, "every token is special"),
        ({"prompt": "a", "latent": 64}, "there is no latent 64"),
    ):
        answer = client.post("/api/try", json=wrong)
        assert answer.status_code == 400
        assert why in answer.json()["error"], answer.json()
    with TestClient(app(site), base_url="http://localhost") as without_model:
        assert without_model.post("/api/try", json=asked).status_code == 404
        assert "Try a text" not in without_model.get("/latent/1").text


def test_the_map_holds_the_latent_and_its_neighbours(client: TestClient, site: Site) -> None:
    """Places within the square, the latent first."""
    places = client.get("/api/map/1").json()["places"]
    assert places[0][0] == 1
    assert [i for i, *_ in places[1:13]] == [n.latent for n in site.neighbours(1)]
    assert all(-1.001 <= v <= 1.001 for _, *xy in places for v in xy)
    assert client.get("/api/map/64").status_code == 404
