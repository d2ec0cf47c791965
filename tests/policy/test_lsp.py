"""Editors: what the real yaml-language-server makes of the schemas, over its own protocol.

Needs Node and the server from npm: `make lsp` puts it where this looks.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.policy.example import GOOD

SERVER = shutil.which("yaml-language-server", path=".lsp/node_modules/.bin")
MODELINE = "# yaml-language-server: $schema=./saeguard.policy.v1.json\n"

pytestmark = pytest.mark.skipif(
    SERVER is None or shutil.which("node") is None,
    reason="needs Node and yaml-language-server: run `make lsp`",
)


class Editor:
    """The editor's end of the Language Server Protocol, over standard input and output."""

    def __init__(self, folder: Path) -> None:
        """Start the server on `folder`."""
        assert SERVER is not None
        command = ["node", os.path.realpath(SERVER), "--stdio"]
        self._server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._folder = folder
        self._last = 0
        self.diagnostics: dict[str, list[Any]] = {}
        self.ask(
            "initialize",
            {
                "processId": os.getpid(),
                "rootUri": folder.as_uri(),
                "capabilities": {
                    "textDocument": {
                        "publishDiagnostics": {},
                        "hover": {"contentFormat": ["plaintext"]},
                        "completion": {"completionItem": {"documentationFormat": ["plaintext"]}},
                    }
                },
            },
        )
        self.tell("initialized", {})
        settings = {"yaml": {"validate": True, "hover": True, "completion": True}}
        self.tell("workspace/didChangeConfiguration", {"settings": settings})

    def tell(self, method: str, params: Any) -> None:
        """Send a notification."""
        self._send({"method": method, "params": params})

    def ask(self, method: str, params: Any) -> Any:
        """Send a request and return its result."""
        self._last += 1
        self._send({"id": self._last, "method": method, "params": params})
        while True:
            message = self._next()
            if message.get("id") == self._last and "method" not in message:
                assert "error" not in message, message
                return message["result"]

    def open(self, name: str, text: str) -> str:
        """Open a file and return its URI, once the server has said what is wrong with it."""
        path = self._folder / name
        path.write_text(text)
        document = {"uri": path.as_uri(), "languageId": "yaml", "version": 1, "text": text}
        self.tell("textDocument/didOpen", {"textDocument": document})
        while path.as_uri() not in self.diagnostics:
            self._next()
        return path.as_uri()

    def at(self, method: str, uri: str, line: int, character: int) -> Any:
        """Ask about a place, counted from 0."""
        place = {"line": line, "character": character}
        return self.ask(method, {"textDocument": {"uri": uri}, "position": place})

    def close(self) -> None:
        """End the server that was started here."""
        self._server.terminate()
        self._server.wait(10)

    def _send(self, message: dict[str, Any]) -> None:
        body = json.dumps({"jsonrpc": "2.0", **message}).encode()
        assert self._server.stdin is not None
        self._server.stdin.write(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        self._server.stdin.flush()

    def _next(self) -> dict[str, Any]:
        """Return the next message, after answering it where the server asks something."""
        assert self._server.stdout is not None
        length = 0
        while (line := self._server.stdout.readline().strip()) or not length:
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
            assert line or self._server.poll() is None, "the server has ended"
        message: dict[str, Any] = json.loads(self._server.stdout.read(length))
        if message.get("method") == "textDocument/publishDiagnostics":
            self.diagnostics[message["params"]["uri"]] = message["params"]["diagnostics"]
        elif "id" in message and "method" in message:
            asked = message.get("params", {}).get("items", [])
            self._send({"id": message["id"], "result": [None] * len(asked) or None})
        return message


@pytest.fixture
def editor(tmp_path: Path) -> Iterator[Editor]:
    """Open an editor in a folder that holds the schemas that ship."""
    for schema in Path("policies").glob("saeguard.*.v1.json"):
        shutil.copy(schema, tmp_path)
    made = Editor(tmp_path)
    yield made
    made.close()


def place(text: str, marked: str) -> tuple[int, int]:
    """Return line and character of where `marked` starts, counted from 0."""
    before = text[: text.index(marked)]
    return before.count("\n"), len(before.rsplit("\n", 1)[-1])


def test_good_policy(editor: Editor) -> None:
    """Nothing is underlined in a good policy."""
    uri = editor.open("good.yaml", MODELINE + GOOD)

    assert editor.diagnostics[uri] == []


def test_mistakes_are_underlined(editor: Editor) -> None:
    """A misspelt key and a misspelt value are underlined where they stand."""
    text = MODELINE + GOOD.replace("severity: high", "severity: hihg").replace("owner:", "ownr:")
    uri = editor.open("bad.yaml", text)

    told = {(d["range"]["start"]["line"], d["message"]) for d in editor.diagnostics[uri]}
    lines = {line for line, _ in told}
    assert {place(text, "hihg")[0], place(text, "ownr")[0]} <= lines
    [value] = [message for line, message in told if line == place(text, "hihg")[0]]
    assert '"critical"' in value
    assert any("ownr" in message for _, message in told)


def test_completion(editor: Editor) -> None:
    """The keys that are missing are offered with their descriptions, and a key's values."""
    text = MODELINE + GOOD + "\n"
    uri = editor.open("keys.yaml", text)

    offered = editor.at("textDocument/completion", uri, text.count("\n") - 1, 0)["items"]
    keys = {item["label"]: item.get("documentation", "") for item in offered}
    assert {"uncached", "clamp", "message"} <= set(keys)
    assert "severity" not in keys  # it is there already
    assert "Tenants" not in keys["clamp"]
    assert "clamped" in str(keys["clamp"])

    line, character = place(text, "shadow")
    values = editor.at("textDocument/completion", uri, line, character)["items"]
    assert {"shadow", "enforce"} <= {item["label"] for item in values}


def test_hover(editor: Editor) -> None:
    """Hovering over a key shows what it says."""
    text = MODELINE + GOOD
    uri = editor.open("hover.yaml", text)

    shown = editor.at("textDocument/hover", uri, *place(text, "for: 3"))

    assert "At how many of the last tokens the condition must hold" in str(shown["contents"])


def test_test_files(editor: Editor) -> None:
    """Test files have a schema of their own."""
    text = (
        "# yaml-language-server: $schema=./saeguard.test.v1.json\n"
        "schema: saeguard.test/v1\npolicy: a.b\ncases:\n"
        "  - {name: a, prompt_tokens: 1, shares: {a: 0.9x3}, expect: mach}\n"
        "  - {name: b, prompt_tokens: 1, shares: {a: 0.1x3}, expect: no_match}\n"
    )
    uri = editor.open("p.test.yaml", text)

    [told] = editor.diagnostics[uri]
    assert told["range"]["start"]["line"] == 4
    assert '"no_match"' in told["message"]
