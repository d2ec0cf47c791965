"""A stand-in for the Hugging Face hub on loopback: what `hf_hub_download` asks for, no more."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Repositories as folders below `root`, and what was asked of them."""

    root: Path
    url: str = ""
    cut_after: int | None = None
    """Bytes after which the next download is cut off, once."""
    ranges: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@contextmanager
def hub(root: Path) -> Iterator[Hub]:
    """Serve the repositories below `root` until the context ends."""
    state = Hub(root)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Stay quiet."""

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            state.requests.append(f"{self.command} {self.path}")
            repo, _, rest = self.path.lstrip("/").partition("/resolve/")
            revision, _, name = rest.partition("/")
            file = state.root / repo / name
            if revision not in {"main", COMMIT} or not file.is_file():
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound" if rest else "RepoNotFound")
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            content = file.read_bytes()
            start, asked = 0, self.headers.get("Range")
            if asked and body:
                state.ranges.append(asked)
                start = int(asked.removeprefix("bytes=").split("-")[0])
            self.send_response(206 if start else 200)
            if start:
                end = len(content) - 1
                self.send_header("Content-Range", f"bytes {start}-{end}/{len(content)}")
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            if body:
                sent = content[start:]
                if state.cut_after is not None and len(sent) > state.cut_after:
                    sent, state.cut_after = sent[: state.cut_after], None
                    self.close_connection = True
                self.wfile.write(sent)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
