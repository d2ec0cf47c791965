"""A site whose texts, features, policies and events try to do more than be shown."""

from __future__ import annotations

import json
from pathlib import Path

from saeguard.browse.live import Live
from saeguard.browse.site import Site
from saeguard.events.reader import read_log
from saeguard.events.record_schema import Event
from saeguard.events.records import SCHEMA
from saeguard.features.load import load_feature_set
from saeguard.hf.text_files import check_file
from saeguard.latents.build import build_index
from saeguard.latents.index import Index
from saeguard.policy.load import load_policies
from tests.latents.made import Made
from tests.models import write_policy

SCRIPT = "<script>window.owned = 1</script>"
IMAGE = "<img src=x onerror='window.owned = 1'>"
BIDI = "abc\u202efed"


def event(policy: str, request: str, verdict: str = "match") -> dict[str, object]:
    """Return a line of an event log."""
    return {
        "schema": SCHEMA, "event": "verdict", "model": "tiny", "watchlist": "0" * 64,
        "request_id": request, "tenant": None, "finished": "stop", "policy": policy,
        "policy_digest": "0" * 64, "mode": "shadow", "severity": "low", "verdict": verdict,
        "action": "flag", "acted": None, "score": 1.4, "threshold": 1.0, "first_token": 3,
        "matched_tokens": 2, "features": {"loud": {"count": 2, "max": 0.9, "at": 3}},
        "coverage": {"tokens": 9, "evaluated": 8, "skipped": {"not_forwarded": 1}},
        "exception": None, "error": None,
    }  # fmt: skip


def make_site(made: Made, root: Path) -> tuple[Site, Live]:
    """Return a site over hostile texts, and its model."""
    rows = [
        {"id": f"{IMAGE}{i}", "text": words, "label": i % 2}
        for i, words in enumerate([SCRIPT, IMAGE, BIDI, "a" * 200, "\x00\x1b[31m#", "abc#def"] * 3)
    ]
    corpus = root / "hostile.jsonl"
    corpus.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    index = root / "hostile.duckdb"
    features = load_feature_set(made.features.path)
    files = [check_file(corpus, made.lm.tokenizer)]
    build_index(made.lm, made.info, files, index, features=features)
    folder = root / "policies"
    write_policy(
        folder / "own.yaml", id="noise.own", title=f"own {SCRIPT}"[:80], feature_set="demo",
        mode="shadow", detect={"loud": {"feature": "loud", "above": 0.5}}, condition="loud",
        rationale=IMAGE,
    )  # fmt: skip
    log = root / "events.jsonl"
    lines = [
        event("noise.own", SCRIPT),
        event("noise.own", BIDI),
        event("noise.gone", "r3", "no_match"),
    ]
    log.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    site = Site(
        Index(index),
        made.info,
        features,
        load_policies(folder),
        [e for e in read_log(log) if isinstance(e, Event)],
    )
    return site, Live(made.lm, made.info, features)
