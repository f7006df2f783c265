"""A web server of one folder that answers byte ranges, and misbehaves when told to."""

from __future__ import annotations

import contextlib
import http.server
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar


class RangeServer(http.server.ThreadingHTTPServer):
    """Serves `root`; the attributes change what it answers."""

    ignores_ranges = False
    """Whether it answers 200 and the whole file."""
    cuts = 0
    """So many answers to ranges end one byte early."""
    hangs = 0
    """So many requests are answered after ten seconds."""
    forbidden: ClassVar[set[str]] = set()
    """Paths that are answered with 403."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.asked: Counter[str] = Counter()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections stay open, as those of a store
    server: RangeServer

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def do_GET(self) -> None:
        self._answer(has_body=True)

    def _answer(self, *, has_body: bool) -> None:
        server = self.server
        server.asked[self.command] += 1
        if server.hangs > 0:
            server.hangs -= 1
            time.sleep(10)
        name = urllib.parse.unquote(self.path).lstrip("/")
        path = server.root / name
        if name in server.forbidden or not path.is_file():
            self.send_response(403 if name in server.forbidden else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content, status, part = path.read_bytes(), 200, ""
        if (wanted := self.headers.get("Range")) and not server.ignores_ranges:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            part = f"bytes {first}-{last}/{len(content)}"
            content, status = content[int(first) : int(last) + 1], 206
            if server.cuts > 0:
                server.cuts -= 1
                content = content[:-1]
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        if part:
            self.send_header("Content-Range", part)
        self.end_headers()
        if has_body:
            with contextlib.suppress(ConnectionError):
                self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serve_folder(root: Path) -> Iterator[RangeServer]:
    """Serve a folder until the block ends."""
    server = RangeServer(root)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
