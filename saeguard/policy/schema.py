"""The models of a policy file: one source for validation, JSON Schema and documentation."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    Field,
    PlainValidator,
    StringConstraints,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from saeguard.policy import condition, phrases
from saeguard.policy.types import (
    Action,
    Mode,
    OnError,
    Over,
    Scope,
    Severity,
    Uncached,
    When,
    Window,
)
from saeguard.yaml_files.section import FORMS, Section

POLICY_ID = r"^[a-z0-9]+([.-][a-z0-9]+)*$"
SELECTION = rf"^{condition.NAME}$"
FEATURE = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
FEATURE_SET = r"^[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)*$"
RECORDING = r"^[A-Za-z0-9][A-Za-z0-9_.-]*\.safetensors$"

FORMS[POLICY_ID] = (
    "lower-case words joined by dots and hyphens, such as unsafe-code.shell-injection"
)
FORMS[SELECTION] = "a lower-case letter, then letters, digits and _, such as shell_command"
FORMS[FEATURE] = "letters, digits and _ . - such as shell_command"
FORMS[FEATURE_SET] = (
    "a path below the feature set folder without its .yaml, such as demo/unsafe-code"
)
FORMS[RECORDING] = "the name of a file beside this one, such as shell-command.safetensors"

PolicyId = Annotated[str, StringConstraints(pattern=POLICY_ID, max_length=100)]
ShortText = Annotated[str, StringConstraints(min_length=1, max_length=200)]
LongText = Annotated[str, StringConstraints(min_length=1, max_length=4000)]
SelectionName = Annotated[str, StringConstraints(pattern=SELECTION, max_length=64)]
FeatureName = Annotated[str, StringConstraints(pattern=FEATURE, max_length=100)]


T = TypeVar("T")


def _phrase(read: Callable[[str], T]) -> PlainValidator:
    """Return a validator that reads a phrase; its error describes the expected form."""

    def validate(value: Any) -> T:
        try:
            return read(str(value))
        except ValueError as error:
            raise PydanticCustomError("bad-phrase", "{reason}", {"reason": str(error)}) from None

    return PlainValidator(validate)


def _text(pattern: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "pattern": f"^{pattern}$"})


class SelectionSection(Section):
    """Holds at each token at which the feature's share is above a threshold."""

    feature: FeatureName = Field(description="A feature of the policy's feature set.")
    above: float = Field(
        gt=0,
        le=100,
        description="Holds if the feature's share of its calibrated range is above this; a "
        "share that equals it does not hold. 0 is quiet, 1 is as strong as in calibration.",
    )
    over: Annotated[Over, _phrase(phrases.over), _text(phrases.OVER)] = Field(
        default=Over(),
        description="What is compared in place of the token's own share: mean of 16 tokens, max "
        "of 16 tokens, average with half-life 8 tokens, max of the request.",
    )


class ClampSection(Section):
    """The edit of `action: clamp`."""

    features: list[FeatureName] = Field(
        min_length=1, max_length=32, description="Features whose clamp latents are set."
    )
    to: float | None = Field(
        default=None,
        ge=-10,
        le=10,
        description="The share of the calibrated range they are set to.",
    )
    activation: float | None = Field(
        default=None,
        ge=-1e6,
        le=1e6,
        description="The activation they are set to, in the SAE's own unit.",
    )
    scale: float | None = Field(
        default=None, ge=-10, le=10, description="The factor they are multiplied with."
    )
    ablate: Literal[True] | None = Field(
        default=None, description="true: their activation is set to 0."
    )
    at_most: float | None = Field(
        default=None,
        ge=-10,
        le=10,
        description="The share of the calibrated range that they are cut down to; what lies below "
        "stays.",
    )
    when: When = Field(
        default="rest",
        description="rest: from the first match to the end of the request. matched: while the "
        "policy is on, see keep. always: at every token of the scope, match or not.",
    )


class ExceptionSection(Section):
    """A tenant for whom the action is waived for a time; the verdict is still reported."""

    id: PolicyId = Field(description="Name of the exception; appears in events.")
    reason: ShortText = Field(description="Why the action is waived.")
    owner: ShortText = Field(description="Who answers for the exception.")
    expires: date = Field(description="The last day on which it holds.")
    tenant: ShortText = Field(description="The tenant whose requests it covers.")


class PolicyFile(Section):
    """One behaviour to watch for, the condition of a match, and what is done then."""

    schema_: Literal["saeguard.policy/v1"] = Field(
        alias="schema", description="The version of this format."
    )
    id: PolicyId = Field(
        description="Stable name. May be used twice: once in shadow and once enforced."
    )
    title: ShortText = Field(description="What the policy watches for, in one line.")
    owner: ShortText = Field(description="Who answers for the policy.")
    severity: Severity = Field(description="How bad a true match is.")
    mode: Mode = Field(description="shadow: report what would be done. enforce: do it.")
    action: Action = Field(
        description="What a match leads to, weakest first: log, flag, clamp, stop. The strongest "
        "action of all matching policies is taken."
    )
    on_error: OnError = Field(
        default="allow",
        description="What happens to a request that could not be evaluated because of an error. "
        "Required if mode is enforce.",
    )
    scope: Scope = Field(description="Which tokens are looked at.")
    uncached: Uncached = Field(
        default="count",
        description="What happens to prompt tokens whose KV is cached but which were not "
        "evaluated, such as KV from elsewhere: count them as not evaluated, or recompute.",
    )
    sample: Annotated[float, _phrase(phrases.sample), _text(phrases.SAMPLE)] = Field(
        default=1.0,
        description="The share of requests that are looked at, chosen by a hash of policy and "
        "request: 10%. The others get the verdict not_evaluated. Default: 100%.",
    )
    feature_set: Annotated[str, StringConstraints(pattern=FEATURE_SET, max_length=200)] = Field(
        description="The feature set that the features come from, by its path without .yaml."
    )
    rationale: LongText = Field(description="What fires, and why that matters.")
    falsepositives: list[ShortText] = Field(
        default=[], max_length=50, description="Harmless texts that are known to match."
    )
    review_by: date | None = Field(
        default=None, description="After this day `saeguard check` asks for a review."
    )
    detect: dict[SelectionName, SelectionSection] = Field(
        min_length=1, max_length=32, description="Named selections for use in the condition."
    )
    condition: Annotated[str, StringConstraints(min_length=1, max_length=2000)] = Field(
        description="Selections joined by and, or, not, parentheses, `2 of (a, b, c)`, "
        "`any of (...)`, `all of (...)` and `5 points of (3 for a, 2 for b)`; judged at each token."
    )
    for_: Annotated[
        Window,
        _phrase(phrases.window),
        _text(phrases.WINDOW),
    ] = Field(
        default=Window(),
        alias="for",
        description="At how many of the last tokens the condition must hold: 3 of 8 tokens, or "
        "of all so far: 20 tokens in the request; or whether it holds at the last token in scope: "
        "the last token. At most 64 tokens. Default: 1 of 1 tokens.",
    )
    keep: Annotated[
        int,
        _phrase(phrases.keep),
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "integer", "minimum": 0, "maximum": phrases.MAX_KEEP},
                    {"type": "string", "pattern": f"^{phrases.KEEP}$"},
                ]
            }
        ),
    ] = Field(
        default=0,
        description="For how many more tokens the policy stays on after a match: 16 tokens.",
    )
    clamp: ClampSection | None = Field(
        default=None, description="What is clamped; with action: clamp, and only then."
    )
    message: ShortText | None = Field(
        default=None,
        description="What the client reads in place of the text, with action: stop, and only then.",
    )
    accept_weak: ShortText | None = Field(
        default=None,
        description="Why the policy may be enforced although `saeguard check` finds that a feature "
        "or a threshold is of no use (weak-feature).",
    )
    exceptions: list[ExceptionSection] = Field(
        default=[], max_length=100, description="Tenants for whom the action is waived for a time."
    )


def without_null(properties: dict[str, Any]) -> None:
    """Take `null` out of the alternatives: an optional key is left out, never null."""
    for name, value in properties.items():
        alternatives = value.get("anyOf", ())
        if {"type": "null"} in alternatives:
            kept = {k: v for k, v in value.items() if k not in {"anyOf", "default"}}
            properties[name] = kept | alternatives[0]


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of policy files, for editors."""
    schema = PolicyFile.model_json_schema(by_alias=True)
    properties = schema["properties"]
    without_null(properties)
    for section in schema["$defs"].values():
        without_null(section["properties"])
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "saeguard.policy/v1",
    }
