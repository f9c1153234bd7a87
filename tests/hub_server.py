"""A hub over HTTP: as much of the Hugging Face hub's interface as reading and uploading a model asks for."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "a" * 40


class Hub(ThreadingHTTPServer):
    """Serves from a thread of its own, at `url`.

    Attributes:
        repositories: by owner/name, the files' contents by path.
        revisions: branches and tags, which all repositories have and which all mean their one commit.
        refused: requests that this hub does not know.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.revisions = {"main", COMMIT}
        self.refused: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repository, revision, file = match.groups()
            if (error := self._missing(repository, revision)) is not None:
                self._fail(error)
            elif file not in self.server.repositories[repository]:
                self._fail("EntryNotFound")
            else:
                content = self.server.repositories[repository][file]
                digest = hashlib.sha1(content).hexdigest()
                self._reply(content, {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/([^/]+)", path):
            if (error := self._missing(*match.groups())) is not None:
                self._fail(error)
            else:
                files = [{"rfilename": file} for file in self.server.repositories[match[1]]]
                self._reply({"id": match[1], "modelId": match[1], "sha": COMMIT, "siblings": files})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            self._reply(
                [
                    {
                        "type": "file",
                        "path": file,
                        "size": len(content),
                        "oid": hashlib.sha1(content).hexdigest(),
                    }
                    for file, content in self.server.repositories[match[1]].items()
                ]
            )
        else:
            self._refuse()

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = self.path.partition("?")[0]
        body = self._body()
        if path == "/api/repos/create":
            asked = json.loads(body)
            repository = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.server.repositories.setdefault(repository, {})
            self._reply({"url": f"{self.server.url}/{repository}"})
        elif path == "/api/validate-yaml":
            self._reply({"errors": [], "warnings": []})
        elif re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/main", path):
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": file, "uploadMode": "regular", "shouldIgnore": False} for file in files]
            self._reply({"files": modes})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.repositories[match[1]][line["value"]["path"]] = content
            self._reply({"commitUrl": f"{self.server.url}/{match[1]}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self._refuse()

    def _missing(self, repository: str, revision: str) -> str | None:
        """The hub's code for what does not exist, None if both do."""
        if repository not in self.server.repositories:
            return "RepoNotFound"
        return None if revision in self.server.revisions else "RevisionNotFound"

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _reply(self, body: Any, headers: dict[str, str] | None = None, status: int = 200) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _fail(self, code: str) -> None:
        self._reply({"error": code}, {"X-Error-Code": code}, status=404)

    def _refuse(self) -> None:
        self.server.refused.append(f"{self.command} {self.path}")
        self._reply({"error": "unknown"}, status=404)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the standard library's prints every request."""
