"""`saeguard serve` refuses, before vLLM starts, what would be guarded wrongly."""

from __future__ import annotations

from pathlib import Path

import pytest

from saeguard.cli.serve import startup_report
from tests import models


@pytest.mark.parametrize(
    "options",
    [
        ["--chat-template", "x.jinja"],
        ["--dtype", "float32", "--chat_template=x.jinja"],
        ["--trust-request-chat-template"],
    ],
)
def test_another_chat_template_and_a_role(tmp_path: Path, options: list[str]) -> None:
    """Turns told by one template and written by another would be told wrongly."""
    guarded = models.make_guarded(tmp_path)
    settings = {"policies": str(guarded.policies), "feature_sets": str(guarded.feature_sets)}
    plain = startup_report(settings, options)
    models.write_policy(
        guarded.policies / "r.yaml",
        id="by.role",
        scope="user",
        detect={"a": {"feature": "f0", "above": 0.5}},
        condition="a",
    )
    with pytest.raises(ValueError, match="tokenizer's own chat template") as caught:
        startup_report(settings, options)
    assert "r.yaml has `scope: user`" in str(caught.value)
    assert len(startup_report(settings, ["--dtype", "float32"])) == len(plain) + 1
