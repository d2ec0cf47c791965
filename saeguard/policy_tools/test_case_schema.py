"""The models of a test file: one source for validation, JSON Schema and documentation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from saeguard.policy.schema import (
    RECORDING,
    FeatureName,
    LongText,
    PolicyId,
    ShortText,
    without_null,
)
from saeguard.policy_tools.traces import MAX_TOKENS
from saeguard.yaml_files.section import Section

_RUN = "[1-9][0-9]{0,4} (template|system|user|assistant|tool|continued)"
ROLES = f"^{_RUN}(, {_RUN})*$"
Tokens = Annotated[int, Field(ge=0, le=MAX_TOKENS)]


class MessageSection(Section):
    """One message of a chat."""

    role: ShortText = Field(description="The role, as the chat template knows it: user.")
    content: LongText = Field(description="The text of the message.")


class CaseSection(Section):
    """One text, and what the policy must conclude of it."""

    name: ShortText = Field(description="What the text is, or what the case shows.")
    shares: dict[FeatureName, str] | None = Field(
        default=None,
        min_length=1,
        description="Per feature one share per token: 0x4 0.9x3 0. All of one length; a feature "
        "of the policy that is left out is 0 throughout.",
    )
    prompt_tokens: Tokens | None = Field(
        default=None, description="With shares: how many of the tokens are the prompt."
    )
    roles: Annotated[str, StringConstraints(pattern=ROLES, max_length=1000)] | None = Field(
        default=None,
        description="With shares: the roles of the prompt's tokens, such as 2 template, "
        "5 user, 3 template. Default: all user.",
    )
    recording: Annotated[str, StringConstraints(pattern=RECORDING, max_length=200)] | None = Field(
        default=None,
        description="A file of `saeguard policy record` that lies beside this one.",
    )
    recorded_text: ShortText | None = Field(
        default=None, description="With recording: the id of the text in it."
    )
    prompt: LongText | None = Field(
        default=None, description="What the model is given; completion may follow."
    )
    messages: list[MessageSection] | None = Field(
        default=None,
        min_length=1,
        max_length=100,
        description="A chat that the model is given, through its template; completion may follow.",
    )
    completion: LongText | None = Field(
        default=None, description="The output of the model. Needs `--model` to run."
    )
    expect: Literal["match", "no_match"] = Field(description="The verdict.")
    first_token: Tokens | None = Field(
        default=None, description="Position of the first match, counted from 0."
    )
    matched_tokens: Tokens | None = Field(
        default=None, description="At how many tokens the policy is on, those kept on included."
    )
    todo: bool = Field(
        default=False,
        description="true: known to fail. The case may fail, and is reported once it passes.",
    )


class CaseFile(Section):
    """The tests of one policy."""

    schema_: Literal["saeguard.test/v1"] = Field(
        alias="schema", description="The version of this format."
    )
    policy: PolicyId = Field(description="The id of the policy in the file beside this one.")
    cases: list[CaseSection] = Field(
        min_length=2, max_length=500, description="At least one match and one no_match."
    )


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of test files, for editors."""
    schema = CaseFile.model_json_schema(by_alias=True)
    for section in (schema, *schema["$defs"].values()):
        without_null(section["properties"])
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "saeguard.test/v1",
    }
