"""A Hugging Face hub on this machine: as much of its web interface as an upload needs."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

import yaml

from tests.helpers import local_server

TOKEN = "hf_" + "a" * 34


@dataclass
class FakeHub:
    """What was uploaded, and what the hub refuses.

    Attributes:
        files: repository -> path -> contents.
        visibility: repository -> as it was asked for; None: as the hub makes it.
        refuses: beginning of a path -> status of the answer.
    """

    url: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    visibility: dict[str, str | None] = field(default_factory=dict)
    refuses: dict[str, int] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)

    def answer(self, path: str, token: str, body: bytes) -> tuple[int, Any]:
        self.tokens.add(token)
        for beginning, status in self.refuses.items():
            if path.startswith(beginning):
                return status, {"error": f"no, {status}"}
        if path.startswith("/large/"):
            self.large[path.removeprefix("/large/")] = body
            return 200, {}
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials"}
        if path == "/api/repos/create":
            return self._create(**json.loads(body))
        if path == "/api/validate-yaml":
            head = yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
            wrong = [] if head["library_name"] else ["library_name"]
            return (400 if wrong else 200), {"errors": wrong, "warnings": []}
        if path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            kinds = {True: "lfs", False: "regular"}
            return 200, {
                "files": [
                    {
                        "path": name,
                        "uploadMode": kinds[name.endswith(".safetensors")],
                        "shouldIgnore": False,
                    }
                    for name in names
                ]
            }
        if path.endswith(".git/info/lfs/objects/batch"):
            return 200, {"objects": [self._upload(**one) for one in json.loads(body)["objects"]]}
        if path.endswith("/commit/main"):
            repo = path.removeprefix("/api/models/").removesuffix("/commit/main")
            self._commit(repo, body)
            return 200, {"commitUrl": f"{self.url}/{repo}/commit/1", "commitOid": "1"}
        return 404, {"error": f"nothing at {path}"}

    def _create(self, name: str, organization: str | None, **more: Any) -> tuple[int, Any]:
        repo = f"{organization or 'me'}/{name}"
        if repo in self.files:
            return 409, {
                "error": "You already created this model repo",
                "url": f"{self.url}/{repo}",
            }
        self.files[repo] = {}
        self.visibility[repo] = more.get("visibility")
        return 200, {"url": f"{self.url}/{repo}"}

    def _upload(self, oid: str, size: int, **_: Any) -> dict[str, Any]:
        return {
            "oid": oid,
            "size": size,
            "actions": {"upload": {"href": f"{self.url}/large/{oid}", "header": {}}},
        }

    def _commit(self, repo: str, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.files[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                contents = self.large[value["oid"]]
                assert hashlib.sha256(contents).hexdigest() == value["oid"]
                self.files[repo][value["path"]] = contents


@contextmanager
def serving() -> Iterator[FakeHub]:
    """Serve a hub within the block."""
    hub = FakeHub()

    def answer(request: BaseHTTPRequestHandler) -> None:
        length = int(request.headers.get("Content-Length", 0))
        body = request.rfile.read(length)
        path = request.path.partition("?")[0]
        status, record = hub.answer(path, request.headers.get("Authorization", ""), body)
        said = json.dumps(record).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(said)))
        request.end_headers()
        request.wfile.write(said)

    with local_server.serving(do_POST=answer, do_PUT=answer, do_GET=answer) as hub.url:
        yield hub
