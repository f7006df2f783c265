"""A web server for one folder, with byte ranges and ETags: what an object store offers."""

from __future__ import annotations

import http.server
import urllib.parse
from pathlib import Path
from typing import Any


class RangeHandler(http.server.BaseHTTPRequestHandler):
    """Serves `root` with ranges and ETags; `ignores_ranges` sends files whole."""

    root = Path()
    ignores_ranges = False

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def do_GET(self) -> None:
        self._answer(has_body=True)

    def _answer(self, *, has_body: bool) -> None:
        path = self.root / urllib.parse.unquote(self.path).lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        content, status = path.read_bytes(), 200
        if (wanted := self.headers.get("Range")) and not self.ignores_ranges:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            content, status = content[int(first) : int(last) + 1], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.end_headers()
        if has_body:
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass
