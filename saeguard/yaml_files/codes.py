"""The code of every mistake that can be found in a file, each with a page of its own."""

from __future__ import annotations

from typing import Literal, TypeAlias

from saeguard.urls import DOCS

Code: TypeAlias = Literal[
    # the file
    "not-found",
    "unreadable",
    "file-name",
    "link-loop",
    "too-large",
    "too-many-files",
    "no-policies",
    "not-utf8",
    "control-character",
    # YAML
    "yaml-syntax",
    "empty-file",
    "several-documents",
    "directive",
    "anchor",
    "alias",
    "tag",
    "merge-key",
    "key-type",
    "duplicate-key",
    "no-value",
    "ambiguous-value",
    "too-deep",
    "too-many-values",
    # keys and values
    "unknown-key",
    "missing-key",
    "wrong-type",
    "not-allowed",
    "out-of-range",
    "too-long",
    "empty-value",
    "bad-name",
    "bad-phrase",
    "invalid-value",
    # the condition
    "condition-syntax",
    "condition-mixed",
    "condition-count",
    "condition-size",
    "unknown-selection",
    "unused-selection",
    "holds-when-quiet",
    "never-holds",
    "never-matched",
    # the policy as a whole
    "on-error-missing",
    "clamp-missing",
    "clamp-unused",
    "clamp-edit",
    "message-unused",
    "decided-late",
    "duplicate-id",
    "duplicate-name",
    "exception-expired",
    "review-due",
    "forgeable-turn",
    "text-in-pieces",
    # what it refers to
    "unknown-feature-set",
    "unknown-feature",
    "no-clamp-latents",
    "clamp-layer",
    "not-calibrated",
    "approximate-topk",
    "weak-feature",
    "strong-edit",
    "other-model",
    "to-do",
    # a feature set
    "set-id",
    "sae-name",
    "model-mismatch",
    "not-pinned",
    "detect-or-probe",
    "no-sae",
    "probe-layers",
    "max-norm",
    "empty-range",
    "unknown-latent",
    "topk-measured",
    "no-checkpoint",
    "other-checkpoint",
    "other-probe",
    # its tests
    "test-missing",
    "test-orphan",
    "test-policy",
    "test-cases",
    "test-kind",
    "test-trace",
    "test-recording",
    "test-expectation",
    "test-failed",
    "test-passes",
]
"""Short and stable, so that they can be searched for and switched on in CI."""


def page(code: Code) -> str:
    """Return the address of the page that explains a code."""
    return f"{DOCS}/errors/{code}/"
