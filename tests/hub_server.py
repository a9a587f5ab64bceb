"""A small server of the Hub's HTTP interface, for the tests: repositories in memory, tokens, commits, and faults.

It shows how the real client was read, and proves nothing about the real Hub. `python tests/hub_server.py PORT` starts
one by hand.
"""

import base64
import hashlib
import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import yaml


WRITE_TOKEN, READ_TOKEN = "hf_writeTokenOfTheTests0001", "hf_readTokenOfTheTests00002"
USER = "tester"
LFS_SUFFIXES = (".safetensors", ".bin", ".png")


@dataclass
class Repository:
    private: bool
    commits: list[tuple[str, str, dict[str, bytes]]] = field(default_factory=list)  # (id, message, files)
    branches: dict[str, str] = field(default_factory=dict)

    def add(self, branch: str, message: str, files: dict[str, bytes]) -> str:
        blob = json.dumps([len(self.commits), message, sorted(files)]).encode() + b"".join(files.values())
        commit = hashlib.sha1(blob, usedforsecurity=False).hexdigest()
        self.commits.append((commit, message, files))
        self.branches[branch] = commit
        return commit

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        wanted = self.branches.get(revision, revision)
        return next(((commit, files) for commit, _, files in self.commits if commit == wanted), None)


@dataclass
class Fault:
    """What to do instead of answering a request whose method and path match."""

    pattern: str
    status: int = 0  # 0: drop the connection; -1: wait, then answer
    times: int = 1_000


class HubServer(ThreadingHTTPServer):
    """State and address of a running server; see [`running_hub`]."""

    daemon_threads = True

    def __init__(self, port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, int]] = []  # method, path, status
        self.faults: list[Fault] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception() if sys.version_info >= (3, 11) else sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        found = self.repositories[repo_id].at(revision)
        return found[1] if found else {}

    def environment(self, home, token: str | None = WRITE_TOKEN) -> dict[str, str]:
        """What a client process needs to talk to this server and to nothing else."""
        found = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
        }
        return found | ({"HF_TOKEN": token} if token else {})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, format, *args):
        pass

    def do_GET(self):
        self.answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def answer(self) -> None:
        split = urlsplit(self.path)
        self.route, self.query = unquote(split.path), parse_qs(split.query)
        fault = self.take_fault()
        if fault and fault.status == 0:
            self.rfile.read(min(int(self.headers.get("Content-Length", 0)), 1024))
            self.record(0)
            self.close_connection = True
            return
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if fault and fault.status == -1:
            time.sleep(60)
        elif fault:
            return self.reply(fault.status, {"error": f"injected fault {fault.status}"})
        with self.server.lock:
            for methods, pattern, name in ROUTES:
                match = re.fullmatch(pattern, self.route)
                if match and self.command in methods.split():
                    return getattr(self, name)(*match.groups())
        self.record(404, answered=False)
        self.reply(404, {"error": f"no such route: {self.command} {self.route}"}, recorded=True)

    def take_fault(self) -> Fault | None:
        for fault in self.server.faults:
            if fault.times > 0 and re.search(fault.pattern, f"{self.command} {self.route}"):
                fault.times -= 1
                return fault
        return None

    # Answers

    def record(self, status: int, answered: bool = True) -> None:
        self.server.requests.append((self.command, self.route, status if answered else -404))

    def reply(self, status: int, content=None, headers: dict[str, str] | None = None, recorded: bool = False) -> None:
        data = content if isinstance(content, bytes) else b"" if content is None else json.dumps(content).encode()
        if not recorded:
            self.record(status)
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data))} | (headers or {})
        if status >= 400 and isinstance(content, dict) and "error" in content:
            headers["X-Error-Message"] = content["error"]
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def json(self):
        return json.loads(self.body or b"{}")

    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def refused(self, write: bool) -> bool:
        """Answer 401 or 403 if the token does not allow it."""
        token = self.token()
        if token and token not in (WRITE_TOKEN, READ_TOKEN):
            self.reply(401, {"error": "Invalid credentials in Authorization header"})
        elif write and not token:
            self.reply(401, {"error": "Invalid username or password."})
        elif write and token != WRITE_TOKEN:
            self.reply(403, {"error": "You don't have the rights to write here"})
        else:
            return False
        return True

    def repository(self, repo_id: str, write: bool = False) -> Repository | None:
        repository = self.server.repositories.get(repo_id)
        if self.refused(write):
            return None
        if repository is None or (repository.private and not self.token()):
            status = 404 if self.token() else 401
            self.reply(status, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        return repository

    def revision(self, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        repository = self.repository(repo_id)
        if repository is None:
            return None
        found = repository.at(revision)
        if found is None:
            self.reply(404, {"error": f"Invalid rev id: {revision}"}, {"X-Error-Code": "RevisionNotFound"})
        return found

    # Routes

    def whoami(self):
        if self.token() and not self.refused(write=False):
            self.reply(200, {"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}})
        elif not self.token():
            self.reply(401, {"error": "Invalid username or password."})

    def agent_harnesses(self):
        self.reply(200, {"harnesses": []})

    def validate_yaml(self):
        match = re.match(r"---\n(.*?)\n---", self.json()["content"], re.DOTALL)
        errors = [] if match else [{"message": "no metadata"}]
        if match and not isinstance(yaml.safe_load(match[1]), dict):
            errors.append({"message": "metadata is no mapping"})
        self.reply(400 if errors else 200, {"errors": errors, "warnings": []})

    def create(self):
        if self.refused(write=True):
            return
        body = self.json()
        owner = body.get("organization") or USER
        repo_id = f"{owner}/{body['name']}"
        if owner != USER:
            self.reply(403, {"error": f"You don't have the rights to create a model under the namespace {owner!r}"})
        elif repo_id in self.server.repositories:
            self.reply(409, {"error": "You already created this model repo", "url": f"{self.server.url}/{repo_id}"})
        else:
            repository = self.server.repositories[repo_id] = Repository(
                body.get("private") or body.get("visibility") == "private"
            )
            repository.add("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
            self.reply(200, {"url": f"{self.server.url}/{repo_id}", "name": repo_id, "id": repo_id})

    def branch(self, repo_id, name):
        repository = self.repository(repo_id, write=True)
        if repository is None:
            return
        if name in repository.branches:
            return self.reply(409, {"error": f"Reference {name} already exists"})
        repository.branches[name] = repository.branches["main"]
        self.reply(201, {})

    def preupload(self, repo_id, revision):
        if self.repository(repo_id, write=True) and (found := self.revision(repo_id, revision)):
            modes = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["path"].endswith(LFS_SUFFIXES) else "regular",
                    "shouldIgnore": False,
                    "oid": _oid(each["path"], found[1][each["path"]]) if each["path"] in found[1] else None,
                }
                for each in self.json()["files"]
            ]
            self.reply(200, {"files": modes})

    def lfs_batch(self, repo_id):
        if self.repository(repo_id, write=True):
            objects = [dict(each) for each in self.json()["objects"]]
            for each in objects:
                if each["oid"] not in self.server.objects:
                    each["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{each['oid']}", "header": {}}}
            self.reply(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.reply(400, {"error": "wrong content"})
        self.server.objects[oid] = self.body
        self.reply(200)

    def commit(self, repo_id, revision):
        repository = self.repository(repo_id, write=True)
        found = repository and self.revision(repo_id, revision)
        if not found:
            return
        files, message = dict(found[1]), ""
        for line in self.body.splitlines():
            key, value = (operation := json.loads(line))["key"], operation["value"]
            if key == "header":
                message = value["summary"]
                if value.get("parentCommit", found[0]) != found[0]:
                    return self.reply(412, {"error": "A commit has happened since. Please refresh and try again."})
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        commit = repository.add(revision, message, files)
        url = f"{self.server.url}/{repo_id}/commit/{commit}"
        self.reply(200, {"success": True, "commitOid": commit, "commitUrl": url})

    def info(self, repo_id, revision="main"):
        if found := self.revision(repo_id, revision):
            siblings = [{"rfilename": name} for name in found[1]]
            private = self.server.repositories[repo_id].private
            content = {"id": repo_id, "modelId": repo_id, "sha": found[0], "private": private, "siblings": siblings}
            self.reply(200, content | {"tags": [], "downloads": 0, "likes": 0})

    def tree(self, repo_id, revision, folder=None):
        if found := self.revision(repo_id, revision):
            prefix = f"{folder.strip('/')}/" if folder else ""
            chosen = [(name, data) for name, data in found[1].items() if name.startswith(prefix)]
            if prefix and not chosen:
                return self.reply(404, {"error": f"{folder} does not exist"}, {"X-Error-Code": "EntryNotFound"})
            self.reply(200, [{"type": "file", "path": n, "size": len(d), "oid": _oid(n, d)} for n, d in chosen])

    def refs(self, repo_id):
        if repository := self.repository(repo_id):
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
                for name, commit in repository.branches.items()
            ]
            self.reply(200, {"branches": branches, "tags": [], "converts": []})

    def resolve(self, repo_id, revision, name):
        found = self.revision(repo_id, revision)
        if not found:
            return
        commit, files = found
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if name not in files:
            return self.reply(404, {"error": "Entry not found"}, headers | {"X-Error-Code": "EntryNotFound"})
        data = files[name]
        headers["ETag"] = f'"{_oid(name, data)}"'
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(match[1]), int(match[2] or len(data) - 1) + 1
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            return self.reply(206, data[start:stop], headers)
        self.reply(200, data, headers)


def _oid(name: str, data: bytes) -> str:
    if name.endswith(LFS_SUFFIXES):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


REPO = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    ("GET", "/api/agent-harnesses", "agent_harnesses"),
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/validate-yaml", "validate_yaml"),
    ("POST", "/api/repos/create", "create"),
    ("POST", f"/api/models/{REPO}/branch/(.+)", "branch"),
    ("POST", f"/api/models/{REPO}/preupload/(.+)", "preupload"),
    ("POST", f"/{REPO}\\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", "/lfs/([0-9a-f]{64})", "lfs_put"),
    ("POST", f"/api/models/{REPO}/commit/(.+)", "commit"),
    ("GET", f"/api/models/{REPO}/tree/([^/]+)(/.+)?", "tree"),
    ("GET", f"/api/models/{REPO}/refs", "refs"),
    ("GET", f"/api/models/{REPO}/revision/(.+)", "info"),
    ("GET", f"/api/models/{REPO}", "info"),
    ("GET HEAD", f"/{REPO}/resolve/([^/]+)/(.+)", "resolve"),
]


@contextmanager
def running_hub(port: int = 0) -> Iterator[HubServer]:
    """A server on a free port of this machine, for as long as the block runs."""
    server = HubServer(port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def local_client(server: HubServer, monkeypatch) -> Iterator[None]:
    """Let the client of this process talk to the server, without a wait before it tries again."""
    for name, value in {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "ENDPOINT": server.url}.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    hasty = SimpleNamespace(**(vars(time) | {"sleep": lambda seconds: None}))
    monkeypatch.setattr("huggingface_hub.utils._http.time", hasty)
    huggingface_hub.close_session()
    try:
        yield
    finally:
        huggingface_hub.close_session()


if __name__ == "__main__":
    with running_hub(int(sys.argv[1])) as hub:
        print(hub.url, flush=True)
        threading.Event().wait()
