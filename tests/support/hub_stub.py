"""A Hugging Face hub on this machine: what the real client asks of it in order to upload a model, and no more."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


class Hub(ThreadingHTTPServer):
    """Keeps the repositories that were made, the files of every commit, and all requests with their tokens."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, Any]] = {}
        self.commits: dict[str, dict[str, bytes]] = {}
        self.requests: list[tuple[str, str, str | None]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._note()
        self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        self._note()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/([^?]+).*", self.path)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization', 'user')}/{asked['name']}"
            if name.startswith("closed/"):
                return self._answer(403, {"error": f"You cannot write to {name}"})
            self.repos[name] = asked
            return self._answer(200, {"url": f"{self.server.address}/{name}", "name": name, "id": "0"})
        if self.path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if found and found[2] == "preupload":
            files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            return self._answer(
                200, {"files": [{k: f[k] for k in ("path", "uploadMode", "shouldIgnore")} for f in files]}
            )
        if found and found[2] == "commit":
            lines = [json.loads(line) for line in body.splitlines()]
            added = {
                v["path"]: base64.b64decode(v["content"]) for v in (x["value"] for x in lines if x["key"] == "file")
            }
            self.server.commits[found[1]] = added
            url = f"{self.server.address}/{found[1]}/commit/{'0' * 40}"
            return self._answer(200, {"success": True, "commitUrl": url, "commitOid": "0" * 40, "hookOutput": ""})
        return self._answer(404, {"error": f"the stub knows no {self.path}"})

    @property
    def repos(self) -> dict[str, dict[str, Any]]:
        return self.server.repos

    def _note(self) -> None:
        self.server.requests.append((self.command, self.path, self.headers.get("Authorization")))

    def _answer(self, status: int, data: Any, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(data).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def hub() -> Iterator[Hub]:
    """The hub, for as long as the block lasts."""
    server = Hub()
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
