"""Every route of vLLM's HTTP server, and what the guard does on it: writes docs/routes.md.

`python -m tests.server.route_table` writes the table; `test_route_table.py` walks vLLM's own routes
and fails if one of them is not in it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NamedTuple, get_args

from tests.engine import engines

PAGE = engines.ROOT / "docs" / "routes.md"
BEGIN, END = "<!-- routes -->\n", "<!-- end -->\n"
HEAD = "| route | judged | withheld | told |\n|---|---|---|---|\n"

OBJECT = "`saeguard` object, headers"
CHOICE = f"`finish_reason: content_filter`, `stop_reason`; {OBJECT}"


class Row(NamedTuple):
    """What happens on some routes."""

    routes: tuple[str, ...]
    """`METHOD /path`, each; a route whose name ends in `*` stands for all that begin so."""
    judged: str
    withheld: str
    told: str
    test: str = ""
    """Name of the test that shows it, in `test_routes.py`; empty if no engine is asked."""


ANSWERS: tuple[Row, ...] = (
    Row(("POST /v1/chat/completions",), "yes", "yes", CHOICE, "test_a_chat_completion_is_withheld"),
    Row(("POST /v1/completions",), "yes", "yes", CHOICE, "test_completions_are_withheld"),
    Row(
        ("POST /invocations",),
        "yes",
        "yes",
        "as the route that fits the body",
        "test_completions_are_withheld",
    ),
    Row(
        ("POST /v1/chat/completions/batch",),
        "yes",
        "yes",
        CHOICE,
        "test_batched_chats_are_withheld",
    ),
    Row(
        ("POST /v1/responses", "GET /v1/responses/{response_id}"),
        "yes",
        "yes",
        "`status: incomplete`, `incomplete_details.reason: content_filter`, event "
        f"`response.incomplete`; {OBJECT} (no headers when it is read again)",
        "test_responses_are_withheld",
    ),
    Row(
        ("POST /v1/messages",),
        "yes",
        "yes",
        f"`stop_reason: refusal`; {OBJECT}",
        "test_messages_are_refused",
    ),
    Row(
        ("POST /inference/v1/generate",),
        "yes",
        "yes, token ids too",
        CHOICE,
        "test_tokens_in_tokens_out_is_withheld",
    ),
    Row(
        ("POST /generative_scoring",),
        "the prompt; the one generated token is never read",
        "yes: 400 if a policy stopped the prompt",
        OBJECT,
        "test_generative_scores_are_withheld",
    ),
)
"""Routes that a test asks on a real server."""

NOT_ASKED: tuple[Row, ...] = (
    Row(
        ("POST /v2/chat",),
        "yes",
        "yes",
        f"`finish_reason: ERROR`; {OBJECT}. With Cohere's SDK only; no test asks it",
    ),
    Row(
        ("POST /v1/systemone",),
        "as `/generative_scoring`",
        "yes",
        f"{OBJECT}. Models with such heads only; no test asks it",
    ),
    Row(
        ("POST /v1/audio/transcriptions", "POST /v1/audio/translations"),
        "yes",
        "yes",
        f"{OBJECT} if the answer is JSON. Speech models only; no test asks it",
    ),
    Row(
        ("WS /v1/realtime",),
        "yes",
        "yes",
        "not told: no body or header. Speech models only; no test asks it",
    ),
)
"""Routes that the test models do not have; every answer passes the same place."""

NONE: tuple[Row, ...] = (
    Row(
        (
            "POST /v1/chat/completions/render",
            "POST /v1/messages/render",
            "POST /v1/completions/render",
            "POST /v1/responses/render",
            "POST /v1/chat/completions/derender",
            "POST /v1/completions/derender",
            "POST /v1/messages/count_tokens",
            "POST /tokenize",
            "POST /detokenize",
        ),
        "no: nothing is generated, the client brings its own text or tokens",
        "",
        "",
    ),
    Row(
        (
            "POST /v1/responses/{response_id}/cancel",
            "POST /inference/v1/abort_requests",
            "POST /abort_requests",
        ),
        "no: ends requests, which get their verdicts",
        "",
        "",
    ),
    Row(
        (
            "GET /openapi.json",
            "GET /docs",
            "GET /docs/oauth2-redirect",
            "GET /redoc",
            "GET /load",
            "GET /version",
            "GET /kv_event_sources",
            "GET /health",
            "GET /metrics",
            "GET /ping",
            "POST /ping",
            "GET /v1/models",
        ),
        "no: tells of the server, not of a text",
        "",
        "",
    ),
    Row(
        (
            "POST /reset_prefix_cache",
            "POST /reset_mm_cache",
            "POST /reset_encoder_cache",
            "POST /collective_rpc",
            "GET /server_info",
            "POST /sleep",
            "POST /release_kv_cache_memory",
            "POST /wake_up",
            "GET /is_sleeping",
            "POST /pause",
            "POST /resume",
            "GET /is_paused",
            "POST /scale_elastic_ep",
            "POST /is_scaling_elastic_ep",
            "POST /fault_tolerance/apply",
            "GET /fault_tolerance/status",
            "GET /get_world_size",
            "GET /weight_info",
        ),
        "no: the operator's; open them to nobody else",
        "",
        "",
    ),
    Row(
        (
            "POST /init_weight_transfer_engine",
            "POST /shutdown_weight_transfer_engine",
            "POST /start_weight_update",
            "POST /start_draft_weight_update",
            "POST /update_weights",
            "POST /finish_weight_update",
            "POST /update_weight_version",
            "POST /weight_checker",
        ),
        "no: the operator's. Features are made for one set of weights: do not change them",
        "",
        "",
    ),
)

TABLE = (*ANSWERS, *NOT_ASKED, *NONE)


def known() -> set[str]:
    """Return every route of the table."""
    return {route for row in TABLE for route in row.routes}


def routes() -> set[str]:
    """Return every route that vLLM's server can have, whatever it serves, as `METHOD /path`."""
    os.environ |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ENABLE_COHERE_API": "1"}
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.tasks import SupportedTask
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    options = ["--enable-scale-out", "--enable-fault-tolerance"]
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(options)
    return set(_named(build_app(args, tuple(_flat(SupportedTask))).routes))


def _named(found: list[Any]) -> Iterator[str]:
    for route in found:
        for method in getattr(route, "methods", None) or (("WS",) if _is_socket(route) else ()):
            if method != "HEAD":
                yield f"{method} {route.path}"


def _is_socket(route: Any) -> bool:
    return "WebSocket" in type(route).__name__


def _flat(task: Any) -> list[str]:
    return [name for part in get_args(task) for name in (_flat(part) or [part])]


def page() -> str:
    """Return the page with the table as it is."""
    before, rest = PAGE.read_text().split(BEGIN)
    _, after = rest.split(END)
    lines = [
        f"| {'<br>'.join(f'`{r}`' for r in row.routes)} | {row.judged} | {row.withheld} "
        f"| {row.told} |\n"
        for row in TABLE
    ]
    return "".join((before, BEGIN, HEAD, *lines, END, after))


if __name__ == "__main__":
    PAGE.write_text(page())
