"""A Hugging Face hub of one process: as much of its API as pushing and fetching a model asks for."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


@dataclass
class Hub:
    """Repositories by name; each has its commits, and branches that point to one."""

    url: str = ""
    commits: dict[str, dict[str, Files]] = field(default_factory=dict)
    branches: dict[str, dict[str, str]] = field(default_factory=dict)
    blobs: Files = field(default_factory=dict)
    """What came as large files, by SHA-256."""
    created: list[dict] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    refuse: int = 0
    """A status with which every request is answered, if it is not 0."""

    def files(self, repo: str, revision: str = "main") -> Files:
        """What a branch or a commit holds."""
        return self.commits[repo][self.branches[repo].get(revision, revision)]

    def commit(self, repo: str, branch: str, files: Files) -> str:
        """Make a commit of these files, and return its name."""
        text = repr((len(self.commits.setdefault(repo, {})), sorted(files.items())))
        name = hashlib.sha1(text.encode()).hexdigest()
        self.commits[repo][name] = files
        self.branches.setdefault(repo, {})[branch] = name
        return name


@contextmanager
def small_hub() -> Iterator[Hub]:
    """A hub on a free port of this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Answers, hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: Hub, *arguments: object) -> None:
        self._hub = hub
        super().__init__(*arguments)  # pyright: ignore[reportArgumentType]

    def log_message(self, *_: object) -> None:
        """Tests speak for themselves."""

    def _send(self, status: int, body: object = "", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _parts(self) -> list[str]:
        path = unquote(urlsplit(self.path).path).strip("/")
        self._hub.requests.append((self.command, path))
        return path.split("/")

    def do_GET(self) -> None:
        parts = self._parts()
        if self._hub.refuse:
            return self._send(self._hub.refuse)
        api = parts[0] == "api"
        repo = "/".join(parts[2:4] if api else parts[:2])
        rest = parts[4:] if api else parts[2:]
        if repo not in self._hub.commits:
            return self._send(404, X_Error_Code="RepoNotFound")
        name = rest[1] if len(rest) > 1 else "main"
        name = self._hub.branches[repo].get(name, name)
        if name not in self._hub.commits[repo]:
            return self._send(404, X_Error_Code="RevisionNotFound")
        files = self._hub.commits[repo][name]
        if not api:
            return self._send_file(name, files.get("/".join(rest[2:])))
        if rest[:1] == ["tree"]:
            return self._send(200, [_entry(path, data) for path, data in files.items()])
        siblings = [{"rfilename": path} for path in files]
        self._send(200, {"id": repo, "modelId": repo, "sha": name, "siblings": siblings})

    do_HEAD = do_GET

    def _send_file(self, commit: str, data: bytes | None) -> None:
        if data is None:
            return self._send(404, X_Error_Code="EntryNotFound")
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        self._send(200, data, ETag=etag, X_Repo_Commit=commit, Accept_Ranges="none")

    def do_PUT(self) -> None:
        name = self._parts()[-1]
        data = self._read()
        assert hashlib.sha256(data).hexdigest() == name
        self._hub.blobs[name] = data
        self._send(200)

    def do_POST(self) -> None:
        parts, body = self._parts(), self._read()
        if self._hub.refuse:
            return self._send(self._hub.refuse)
        if parts == ["api", "repos", "create"]:
            return self._create(json.loads(body))
        if parts == ["api", "validate-yaml"]:
            return self._send(200, {"errors": [], "warnings": []})
        if parts[-1] == "batch":
            return self._send(200, self._batch(json.loads(body)))
        repo, action, revision = "/".join(parts[2:4]), parts[4], parts[5]
        if repo not in self._hub.commits:
            return self._send(404, X_Error_Code="RepoNotFound")
        if action == "preupload":
            return self._send(200, {"files": [_mode(file) for file in json.loads(body)["files"]]})
        if action == "branch":
            self._hub.branches[repo].setdefault(revision, self._hub.branches[repo]["main"])
            return self._send(200)
        assert action == "commit"
        files = self._hub.files(repo, revision) | {}
        for line in body.decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self._hub.blobs[value["oid"]]
            elif item["key"] == "deletedFile":
                files.pop(value["path"])
        name = self._hub.commit(repo, revision, files)
        url = f"{self._hub.url}/{repo}/commit/{name}"
        self._send(200, {"commitUrl": url, "commitOid": name, "success": True})

    def _create(self, asked: dict) -> None:
        repo = "/".join([asked.get("organization") or "someone", asked["name"]])
        self._hub.created.append(asked)
        if repo in self._hub.commits:
            found = {"error": "You already created this model repo", "id": repo}
            return self._send(409, found | {"url": f"{self._hub.url}/{repo}"})
        self._hub.commit(repo, "main", {".gitattributes": b""})
        self._send(200, {"url": f"{self._hub.url}/{repo}", "id": repo, "name": repo})

    def _batch(self, asked: dict) -> dict:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self._hub.url}/lfs/{one['oid']}"}}}
            for one in asked["objects"]
        ]
        return {"transfer": "basic", "objects": objects}


def _mode(file: dict) -> dict:
    mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}


def _entry(path: str, data: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    if path.endswith(".safetensors"):
        digest = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 134}
    return entry
