"""A stand-in for the hub's API on this machine: it keeps what it is sent, and can refuse, fail or hang up.

It knows plain LFS uploads, not Xet's storage: the client must be told HF_HUB_DISABLE_XET=1.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import yaml
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id

TOKEN = "hf_stand_in_token"
Answer = tuple[int, Any]


class Hub:
    """The hub's state.

    Attributes:
        address: http://127.0.0.1:PORT
        repositories: by id: {"private": bool, "writable": bool, "branches": {name: {path: bytes}}}
        commits: (id, branch, message) of each.
        requests: names of all that was asked, as "create" or "commit".
        faults: by such a name, the status to answer with, or "cut" to hang up.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.repositories: dict[str, dict[str, Any]] = {}
        self.commits: list[tuple[str, str, str]] = []
        self.requests: list[str] = []
        self.faults: dict[str, int | str] = {}
        self.objects: dict[str, bytes] = {}

    def add(self, repo_id: str, *, private: bool = True, writable: bool = True, **files: bytes) -> None:
        """A repository that exists already."""
        kept = {".gitattributes": b"", **files}
        self.repositories[repo_id] = {"private": private, "writable": writable, "branches": {"main": kept}}

    def files(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        """What was committed."""
        kept = self.repositories[repo_id]["branches"][branch]
        return {name: content for name, content in kept.items() if name != ".gitattributes"}

    def whoami(self, _: bytes) -> Answer:
        return 200, {"type": "user", "name": "ada", "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    def create(self, body: bytes) -> Answer:
        wanted = json.loads(body)
        owner = wanted["organization"] or "ada"
        if owner != "ada":
            return 403, "You don't have the rights to create a model under the namespace"
        repo_id = f"{owner}/{wanted['name']}"
        if repo_id in self.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{self.address}/{repo_id}"}
        self.add(repo_id, private=wanted["visibility"] == "private")
        return 200, {"url": f"{self.address}/{repo_id}"}

    def info(self, _: bytes, repo_id: str, branch: str | None = None) -> Answer:
        repository = self.repositories.get(repo_id)
        if repository is None:
            return 404, "Repository not found"
        files = repository["branches"][unquote(branch or "main")]
        siblings = [{"rfilename": name} for name in files]
        return 200, {"id": repo_id, "private": repository["private"], "siblings": siblings, "sha": "0" * 40}

    def auth(self, _: bytes, repo_id: str, write: str | None = None) -> Answer:
        allowed = self.repositories[repo_id]["writable"] or not write
        return (200, {}) if allowed else (403, "This token has no write permission")

    def branch(self, _: bytes, repo_id: str, branch: str) -> Answer:
        branches = self.repositories[repo_id]["branches"]
        if unquote(branch) in branches:
            return 409, "Reference already exists"
        branches[unquote(branch)] = dict(branches["main"])
        return 200, {}

    def validate(self, body: bytes) -> Answer:
        """What of the hub's own check can be made here: the header, its ids, and the model index and back."""
        try:
            check_header(json.loads(body)["content"])
        except (ValueError, KeyError, TypeError, yaml.YAMLError) as error:
            return 400, {"errors": [{"message": str(error)}], "warnings": []}
        return 200, {"errors": [], "warnings": []}

    def preupload(self, body: bytes, repo_id: str, branch: str) -> Answer:
        files = json.loads(body)["files"]
        modes = [("lfs" if file["path"].endswith(".safetensors") else "regular", file["path"]) for file in files]
        return 200, {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for mode, path in modes]}

    def batch(self, body: bytes, repo_id: str) -> Answer:
        objects = [
            {
                "oid": item["oid"],
                "size": item["size"],
                "actions": {"upload": {"href": f"{self.address}/lfs/{item['oid']}"}},
            }
            for item in json.loads(body)["objects"]
        ]
        return 200, {"transfer": "basic", "objects": objects}

    def put(self, body: bytes, oid: str) -> Answer:
        if hashlib.sha256(body).hexdigest() != oid:
            return 400, "digest differs"
        self.objects[oid] = body
        return 200, {}

    def commit(self, body: bytes, repo_id: str, branch: str) -> Answer:
        lines = [json.loads(line) for line in body.splitlines()]
        new = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile":
                new[value["path"]] = self.objects[value["oid"]]
                assert len(new[value["path"]]) == value["size"]
            else:
                assert line["key"] == "file", line
                new[value["path"]] = base64.b64decode(value["content"])
        self.repositories[repo_id]["branches"][unquote(branch)].update(new)
        self.commits.append((repo_id, unquote(branch), lines[0]["value"]["summary"]))
        return 200, {"commitUrl": f"{self.address}/{repo_id}/commit/{'1' * 40}", "commitOid": "1" * 40}


def check_header(card: str) -> None:
    """Raise ValueError, KeyError or TypeError for a card whose header the hub could not use."""
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    if match is None:
        raise ValueError("no metadata")
    header = yaml.safe_load(match[1])
    for name in [header.get("base_model"), *header.get("datasets", [])]:
        if name is not None:
            validate_repo_id(name)
    if header.get("base_model_relation", "finetune") not in ("finetune", "adapter", "merge", "quantized"):
        raise ValueError("base_model_relation")
    if not re.fullmatch(r"[a-z0-9.+-]+", header.get("license", "mit")):
        raise ValueError("license")
    if "model-index" in header:
        again = eval_results_to_model_index(*model_index_to_eval_results(header["model-index"]))
        if again != header["model-index"]:
            raise ValueError("model-index is not the same when read and written again")


_ID = r"([\w.-]+/[\w.-]+)"
_ROUTES = {
    "whoami": ("GET", r"/api/whoami-v2"),
    "create": ("POST", r"/api/repos/create"),
    "auth": ("GET", rf"/api/models/{_ID}/auth-check(/write)?"),
    "info": ("GET", rf"/api/models/{_ID}(?:/revision/([^/]+))?"),
    "branch": ("POST", rf"/api/models/{_ID}/branch/([^/]+)"),
    "validate": ("POST", r"/api/validate-yaml"),
    "preupload": ("POST", rf"/api/models/{_ID}/preupload/([^/]+)"),
    "batch": ("POST", rf"/{_ID}\.git/info/lfs/objects/batch"),
    "put": ("PUT", r"/lfs/(\w+)"),
    "commit": ("POST", rf"/api/models/{_ID}/commit/([^/]+)"),
}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def _answer(self) -> None:
        body = self._body()
        found = [
            (name, match)
            for name, (method, pattern) in _ROUTES.items()
            if method == self.command and (match := re.fullmatch(pattern, self.path.partition("?")[0]))
        ]
        if not found:
            return self._send(404, f"no such route: {self.command} {self.path}")
        (name, match), *_ = found
        self.hub.requests.append(name)
        fault = self.hub.faults.get(name)
        if fault == "cut":
            self.close_connection = True
            return self.connection.close()
        if isinstance(fault, int):
            return self._send(fault, "as the test asks")
        if name not in ("put", "validate") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(401, "Invalid credentials in Authorization header")
        return self._send(*getattr(self.hub, name)(body, *match.groups()))

    do_GET = do_POST = do_PUT = _answer

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, status: int, content: Any) -> None:
        body = json.dumps({"error": content} if isinstance(content, str) else content).encode()
        self.send_response(status)
        if isinstance(content, str):
            self.send_header("X-Error-Message", content)
        if status == 404 and isinstance(content, str) and content.startswith("Repository"):
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers until the end."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {}))
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    server.RequestHandlerClass.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
