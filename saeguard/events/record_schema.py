"""The schema of event lines: one source for the JSON Schema, its descriptions and the tests."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter

from saeguard.events.records import SCHEMA

URL = "https://json-schema.org/draft/2020-12/schema"


class Part(BaseModel):
    """An object without unknown keys, in which every key without a default is required."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Fired(Part):
    """One feature's activity within the request."""

    count: int = Field(ge=0, description="Tokens above the policy's threshold.")
    max: float = Field(description="Highest share of the feature's calibrated range.")
    at: int = Field(ge=0, description="Position of the maximum, from the first prompt token.")


class Skipped(Part):
    """Tokens that were not evaluated, by reason; a closed list."""

    not_forwarded: int | None = Field(
        None, ge=1, description="The last token: it is never fed back, so nothing reads it."
    )
    prefix_cached: int | None = Field(
        None,
        ge=1,
        description="Tokens read from the prefix cache, of which the prefix store has no record.",
    )
    special_token: int | None = Field(
        None, ge=1, description="Tokens that the feature sets exclude by id, such as BOS."
    )
    massive_norm: int | None = Field(
        None,
        ge=1,
        description="Attention sinks: tokens whose residual's norm lies above the feature sets' "
        "max_norm, such as the first of a text.",
    )
    not_sampled: int | None = Field(
        None, ge=1, description="All tokens of a request that the policy's sampling leaves out."
    )
    aborted: int | None = Field(
        None, ge=1, description="Tokens that were not computed before the request ended."
    )
    error: int | None = Field(
        None, ge=1, description="Tokens whose activations could not be read or are not finite."
    )
    untracked: int | None = Field(
        None, ge=1, description="Tokens of a forward pass that brought nothing to the rules."
    )


class Coverage(Part):
    """How much of its scope the policy looked at: `evaluated + sum(skipped) == tokens`."""

    tokens: int = Field(ge=0, description="Tokens in the policy's scope, sampled ones included.")
    evaluated: int = Field(ge=0, description="Tokens that the verdict is about.")
    skipped: Skipped = Field(description="All other tokens, by reason.")


class Line(Part):
    """The keys of every line of the event log, besides `event`, its kind."""

    schema_: Literal["saeguard.event/v2", "saeguard.event/v3"] = Field(
        alias="schema",
        description="Version of this schema. v3 adds the line of a request; every line of v2 is "
        "one of v3, too.",
    )
    model: str = Field(description="Name under which the model is served.")
    time: AwareDatetime | None = Field(
        None, description="When the event was written, UTC; added by the sink."
    )


class Ended(Line):
    """A line about a request that has ended."""

    request_id: str = Field(min_length=1, description="The engine's own id of the request.")
    tenant: str | None = Field(description="Tenant by the request's API key; null if unknown.")
    finished: str | None = Field(description="Why the request ended, in vLLM's words.")


class Event(Ended):
    """One policy's verdict on one request. Never holds prompt, output or token text."""

    event: Literal["verdict"] = Field(description="Kind of the line.")
    watchlist: str = Field(
        description="sha256 over policies, feature sets and checkpoints, or its first digits."
    )
    policy: str = Field(description="Id of the policy.")
    policy_digest: str = Field(description="sha256 of the policy's canonical content.")
    mode: Literal["shadow", "enforce"] = Field(
        description="enforce: the policy's action is taken for this request. shadow: it is not."
    )
    severity: Literal["low", "medium", "high", "critical"] = Field(
        description="The policy's severity."
    )
    verdict: Literal["match", "no_match", "error", "not_evaluated"] = Field(
        description="The policy's verdict. `no_match` is about the evaluated tokens only; the "
        "four are never folded into one another."
    )
    action: Literal["log", "flag", "clamp", "stop"] = Field(description="The policy's action.")
    acted: Literal["log", "flag", "clamp", "stop"] | None = Field(
        description="The action taken; null in shadow, without a match, or under an exception."
    )
    score: float | None = Field(
        description="Highest evidence over threshold; null if no token was evaluated."
    )
    threshold: float = Field(
        ge=1, le=1, description="The policy matches if its score exceeds this; always 1."
    )
    first_token: int | None = Field(
        ge=0, description="Position of the first match, from the first prompt token."
    )
    matched_tokens: int = Field(ge=0, description="Tokens on which the policy was on.")
    features: dict[str, Fired] = Field(description="The features that the policy reads, by name.")
    coverage: Coverage = Field(description="How much of its scope the policy looked at.")
    exception: str | None = Field(description="Id of the exception that waived the action.")
    error: str | None = Field(description="Kind of error; null if every token was read.")
    approximate: bool = Field(
        default=False,
        description="Whether measured thresholds were used in place of the ranks of a TopK SAE's "
        "latents; the feature set states how well they agree.",
    )


class Outcomes(Part):
    """A request's verdicts, counted; one that is missing did not occur."""

    match: int = Field(0, ge=1, description="Verdicts that match.")
    no_match: int = Field(0, ge=1, description="Verdicts without a match.")
    error: int = Field(0, ge=1, description="Verdicts that could not read a token.")
    not_evaluated: int = Field(0, ge=1, description="Verdicts without an evaluated token.")


class Request(Ended):
    """A request that ended, as a whole: the last of its lines."""

    event: Literal["request"] = Field(description="Kind of the line.")
    watchlist: str = Field(
        description="First 12 digits of the sha256 over policies, feature sets and checkpoints."
    )
    policies: int = Field(ge=0, description="Policies that judged it.")
    verdicts: Outcomes = Field(
        description="Their verdicts. Each match and each error has a line of its own; the others "
        "have one under `event_lines: all` only."
    )
    coverage: Coverage = Field(
        description="How much of the request was looked at, whatever the policies' scopes."
    )


class Mismatch(Ended):
    """A request whose coverage does not add up: a fault of the guard, never silent."""

    event: Literal["ledger_mismatch"] = Field(description="Kind of the line.")
    watchlist: str = Field(description="sha256 over policies, feature sets and checkpoints.")
    coverage: Coverage = Field(description="The request's own coverage, which does not add up.")


class Reload(Line):
    """The policy files were read while serving; if refused, the old watch list stays in use."""

    event: Literal["policy.reload"] = Field(description="Kind of the line.")
    outcome: Literal["active", "unchanged", "refused", "failed"] = Field(
        description="active: the new watch list is in use. unchanged: it was in use already. "
        "refused: the files are wrong, or this server cannot serve them. failed: they could not "
        "be read."
    )
    trigger: Literal["files", "signal"] = Field(description="Why the files were read.")
    old: str = Field(description="sha256 of the watch list in use before.")
    new: str | None = Field(
        description="sha256 of the new watch list; null if there is no such list."
    )
    error: str | None = Field(
        description="Why the files were refused, as `saeguard check` reports it."
    )
    policies: int = Field(ge=0, description="Policies in use now.")
    revision: int | None = Field(description="Signed revision in use now; null if unsigned.")
    read_ms: float = Field(
        ge=0, description="Milliseconds of reading and compiling, in a separate process."
    )
    swap_ms: float = Field(
        ge=0,
        description="Milliseconds from then until new requests were judged by it.",
    )
    encoder_rows: int = Field(ge=0, description="Encoder rows written into the taps.")
    came: tuple[str, ...] = Field(default=(), description="Ids of policies that are new.")
    vanished: tuple[str, ...] = Field(default=(), description="Ids of policies that are gone.")
    changed: tuple[str, ...] = Field(
        default=(), description="Ids of policies whose content, mode or feature set differs."
    )
    feature_sets: tuple[str, ...] = Field(
        default=(), description="Names of feature sets whose content differs."
    )
    no_longer_enforced: tuple[str, ...] = Field(
        default=(),
        description="Ids of policies that were enforced before, and are gone or in shadow now.",
    )


class Refusal(Line):
    """A request asked the guard for something it may not have, and got a 400."""

    event: Literal["request.refused"] = Field(description="Kind of the line.")
    tenant: str | None = Field(description="Tenant by the request's API key; null if unknown.")
    reason: str = Field(description="The message of the 400.")


LINE: TypeAdapter[Event | Request | Mismatch | Reload | Refusal] = TypeAdapter(
    Annotated[Event | Request | Mismatch | Reload | Refusal, Field(discriminator="event")]
)


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of one event line, the content of `event.v3.json`."""
    return {"$schema": URL, "$id": SCHEMA, **LINE.json_schema(by_alias=True)}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(json_schema(), indent=2) + "\n")
