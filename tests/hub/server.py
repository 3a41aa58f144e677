"""A small Hugging Face Hub on 127.0.0.1, for tests that push and pull without a network.

It speaks the HTTP routes by which huggingface_hub 2.4, transformers, Trainer, PEFT and datasets create repositories,
commit, branch, tag, list and download. State lives in memory (repository.py) and ends with the server.

Like the real Hub it stores files of some suffixes, and large ones, through git LFS, and keeps them on another host
("localhost" against "127.0.0.1"): the client follows redirects within one host and would then miss X-Repo-Commit.

Left out: Xet (clients need HF_HUB_DISABLE_XET=1), multipart upload, pull requests, Spaces, gated repositories, paging,
organizations, repository names without a namespace. A new repository is empty; the real one holds a .gitattributes.

Clients read HF_ENDPOINT while huggingface_hub is imported, so each runs in a process of its own (conftest.run_client).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml  # the one import beyond the standard library; huggingface_hub itself requires it
from repository import Commit, File, HubError, Repo

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".parquet", ".arrow", ".zip", ".gz", ".npz", ".png", ".model")
LFS_MIN_BYTES = 10 * 2**20
CARD_HEADER = re.compile(r"\A---\r?\n(.*?)\r?\n---", re.DOTALL)


ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Any]]] = []


def route(method: str, pattern: str) -> Callable[[Callable], Callable]:
    """Register a handler. `KIND` and `REPO` stand for the repository's kind and id, `REV` for a quoted revision."""
    pattern = pattern.replace("KIND", "(?P<kind>models|datasets)").replace("REPO", r"(?P<repo>[^/]+/[^/]+)")
    compiled = re.compile(pattern.replace("REV", "(?P<revision>[^/]+)") + "$")

    def register(handler: Callable) -> Callable:
        ROUTES.append((method, compiled, handler))
        return handler

    return register


@dataclass
class Request:
    user: str | None  # None: nobody signed in
    query: dict[str, list[str]]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body or b"{}")


@dataclass
class Response:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class HubServer:
    """The Hub. `tokens` maps each access token to its user; a user may write in the namespace of the same name only.

    Use it as a context manager: the server runs in threads of this process, at `endpoint`. `requests` lists every
    "METHOD path" it answered, so that a test can tell what a client did, and didn't, send.
    """

    def __init__(self, tokens: dict[str, str]):
        self.tokens = tokens
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}  # by sha256
        self.requests: list[str] = []
        self.lock = threading.RLock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self.http.server_port}"
        self.storage = f"http://localhost:{self.http.server_port}/storage"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def answer(self, method: str, url: str, authorization: str | None, body: bytes) -> Response:
        parts = urlsplit(url)
        with self.lock:
            self.requests.append(f"{method} {parts.path}")
            request = Request(self._user(authorization), parse_qs(parts.query), body)
            for route_method, pattern, handler in ROUTES:
                # HEAD is GET without the body, which the handler class leaves out.
                if route_method == ("GET" if method == "HEAD" else method) and (match := pattern.match(parts.path)):
                    arguments = {name: unquote(value) for name, value in match.groupdict().items() if value}
                    if "repo" in arguments:
                        kind = (arguments.pop("kind", None) or "models").strip("/")
                        arguments["repo"] = self._readable(request, kind, arguments["repo"])
                    result = handler(self, request, **arguments)
                    return result if isinstance(result, Response) else _json(result)
        raise HubError(404, f"This stand-in has no route {method} {parts.path}")

    def _user(self, authorization: str | None) -> str | None:
        if authorization is None:
            return None
        token = authorization.removeprefix("Bearer ")
        if token not in self.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.tokens[token]

    def _readable(self, request: Request, kind: str, repo_id: str) -> Repo:
        repo = self.repos.get((kind, repo_id))
        if repo is None or (repo.private and request.user != repo.namespace):
            # The real Hub doesn't tell a private repository from a missing one, and answers 401 to nobody.
            raise HubError(404 if request.user else 401, "Repository not found", "RepoNotFound")
        return repo

    def check_writer(self, request: Request, namespace: str) -> None:
        if request.user is None:
            raise HubError(401, "Invalid username or password.")
        if request.user != namespace:
            raise HubError(403, f"You don't have the rights to write under the namespace {namespace!r}")

    def store(self, content: bytes) -> str:
        sha256 = hashlib.sha256(content).hexdigest()
        self.objects[sha256] = content
        return sha256

    def read(self, repo_id: str, path: str, revision: str = "main", kind: str = "models") -> bytes:
        """One file's bytes, for assertions in tests."""
        return self.objects[self.repos[kind, repo_id].commit_at(revision).files[path].sha256]


def _json(value: Any, status: int = 200) -> Response:
    return Response(json.dumps(value).encode(), status, {"Content-Type": "application/json"})


# Account and repositories


@route("GET", "/api/whoami-v2")
def whoami(hub: HubServer, request: Request) -> dict:
    if request.user is None:
        raise HubError(401, "Invalid username or password.")
    token = {"displayName": "test", "role": "write"}
    return {"type": "user", "name": request.user, "orgs": [], "auth": {"accessToken": token}}


def _named_repo(request: Request) -> tuple[str, str, dict]:
    """Kind, id and the whole body of a request that names its repository there instead of in the path."""
    body = request.json()
    return body.get("type", "model") + "s", f"{body.get('organization') or request.user}/{body['name']}", body


@route("POST", "/api/repos/create")
def create_repo(hub: HubServer, request: Request) -> Response:
    kind, repo_id, body = _named_repo(request)
    if kind not in ("models", "datasets"):
        raise HubError(400, f"This stand-in has no {kind}")
    hub.check_writer(request, repo_id.split("/")[0])
    url = f"{hub.endpoint}/{'' if kind == 'models' else kind + '/'}{repo_id}"
    created = (kind, repo_id) not in hub.repos
    if created:
        first = Commit({}, None, "initial commit", "", repo_id.split("/")[0])
        hub.repos[kind, repo_id] = Repo(kind, repo_id, body.get("visibility") == "private", {"main": first})
    answer = {"url": url, "name": repo_id, "id": repo_id}
    return _json(answer) if created else _json({"error": "You already created this repo", **answer}, 409)


@route("DELETE", "/api/repos/delete")
def delete_repo(hub: HubServer, request: Request) -> dict:
    kind, repo_id, _ = _named_repo(request)
    repo = hub._readable(request, kind, repo_id)
    hub.check_writer(request, repo.namespace)
    del hub.repos[kind, repo_id]
    return {}


@route("PUT", "/api/KIND/REPO/settings")
def change_settings(hub: HubServer, request: Request, repo: Repo) -> dict:
    hub.check_writer(request, repo.namespace)
    repo.private = request.json()["visibility"] == "private"
    return {}


@route("POST", "/api/validate-yaml")
def validate_yaml(hub: HubServer, request: Request) -> dict:
    try:
        card_data(request.json()["content"])
    except ValueError as error:
        problem = {"errors": [{"message": str(error)}], "warnings": []}
        raise HubError(400, "Invalid metadata", body=problem) from None
    return {"errors": [], "warnings": []}


def card_data(text: str) -> dict:
    """The YAML header of a card; empty if there is none. Raises ValueError if it isn't a mapping."""
    header = CARD_HEADER.match(text)
    try:
        data = yaml.safe_load(header[1]) if header else {}
    except yaml.YAMLError as error:
        raise ValueError(f"the card's header isn't YAML: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"the card's header is a {type(data).__name__}, not a mapping")
    return data


@route("GET", "/api/(?P<kind>models|datasets)")
def list_repos(hub: HubServer, request: Request, kind: str) -> list[dict]:
    author, search = (request.query.get(key, [""])[0] for key in ("author", "search"))
    return [
        {"id": repo.id, "author": repo.namespace, "private": repo.private, "sha": repo.branches["main"].oid}
        for repo in hub.repos.values()
        if repo.kind == kind
        and (not repo.private or repo.namespace == request.user)
        and repo.namespace == (author or repo.namespace)
        and search in repo.id
    ]


@route("GET", "/api/KIND/REPO(/revision/REV)?")
def repo_info(hub: HubServer, request: Request, repo: Repo, revision: str = "main") -> dict:
    commit = repo.commit_at(revision)
    text = {path: hub.objects[commit.files[path].sha256] for path in {"README.md", "config.json"} & set(commit.files)}
    card = card_data(text.get("README.md", b"").decode())
    return {
        "id": repo.id,
        "author": repo.namespace,
        "sha": commit.oid,
        "createdAt": commit.history()[-1].date,
        "lastModified": commit.date,
        "private": repo.private,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": card.get("tags") or [],
        "library_name": card.get("library_name"),
        "pipeline_tag": card.get("pipeline_tag"),
        "cardData": json.loads(json.dumps(card, default=str)),
        "config": json.loads(text.get("config.json", b"{}")),
        "siblings": [{"rfilename": path, "size": file.size} for path, file in commit.files.items()],
    }


# Branches, tags, history, listings


@route("GET", "/api/KIND/REPO/refs")
def list_refs(hub: HubServer, request: Request, repo: Repo) -> dict:
    def refs(folder: str, named: dict[str, Commit]) -> list[dict]:
        return [{"name": n, "ref": f"refs/{folder}/{n}", "targetCommit": c.oid} for n, c in named.items()]

    return {"branches": refs("heads", repo.branches), "tags": refs("tags", repo.tags), "converts": []}


@route("POST", "/api/KIND/REPO/branch/(?P<name>[^/]+)")
def create_branch(hub: HubServer, request: Request, repo: Repo, name: str) -> dict:
    hub.check_writer(request, repo.namespace)
    if name in repo.branches:
        raise HubError(409, f"Reference already exists: {name}")
    repo.branches[name] = repo.commit_at(request.json().get("startingPoint", "main"))
    return {}


@route("POST", "/api/KIND/REPO/tag/REV")
def create_tag(hub: HubServer, request: Request, repo: Repo, revision: str) -> dict:
    hub.check_writer(request, repo.namespace)
    name = request.json()["tag"]
    if name in repo.tags:
        raise HubError(409, f"Tag already exists: {name}")
    repo.tags[name] = repo.commit_at(revision)
    return {}


@route("DELETE", "/api/KIND/REPO/(?P<folder>branch|tag)/(?P<name>[^/]+)")
def delete_ref(hub: HubServer, request: Request, repo: Repo, folder: str, name: str) -> dict:
    hub.check_writer(request, repo.namespace)
    named = repo.branches if folder == "branch" else repo.tags
    if name not in named or (folder, name) == ("branch", "main"):
        raise HubError(404, f"No {folder} to delete: {name}", "RevisionNotFound")
    del named[name]
    return {}


@route("GET", "/api/KIND/REPO/commits/REV")
def list_commits(hub: HubServer, request: Request, repo: Repo, revision: str) -> list[dict]:
    return [
        {"id": c.oid, "title": c.title, "message": c.message, "date": c.date, "authors": [{"user": c.author}]}
        for c in repo.commit_at(revision).history()
    ]


def _entries(commit: Commit) -> list[dict]:
    folders = [{"type": "directory", "path": path, "oid": oid, "size": 0} for path, oid in commit.folders().items()]
    return folders + [file.to_json(path) for path, file in commit.files.items()]


@route("GET", "/api/KIND/REPO/tree/REV(/(?P<path>.+))?")
def list_tree(hub: HubServer, request: Request, repo: Repo, revision: str, path: str = "") -> list[dict]:
    prefix = path.rstrip("/") + "/" if path else ""
    below = [entry for entry in _entries(repo.commit_at(revision)) if entry["path"].startswith(prefix)]
    if prefix and not below:
        raise HubError(404, f"{path} does not exist on {revision!r}", "EntryNotFound")
    if request.query.get("recursive") == ["true"]:
        return below
    return [entry for entry in below if "/" not in entry["path"].removeprefix(prefix)]


@route("POST", "/api/KIND/REPO/paths-info/REV")
def paths_info(hub: HubServer, request: Request, repo: Repo, revision: str) -> list[dict]:
    wanted = parse_qs(request.body.decode())["paths"]  # a form, not JSON
    return [entry for entry in _entries(repo.commit_at(revision)) if entry["path"] in wanted]


# Uploads: ask how to send each file (preupload), send the LFS ones, then commit


@route("POST", "/api/KIND/REPO/preupload/REV")
def preupload(hub: HubServer, request: Request, repo: Repo, revision: str) -> dict:
    hub.check_writer(request, repo.namespace)
    known = repo.commit_at(revision).files

    def how(path: str, size: int) -> dict:
        lfs = path.endswith(LFS_SUFFIXES) or size >= LFS_MIN_BYTES
        old = known.get(path)
        # The client leaves a file out of the commit if this id equals its own.
        oid = old.etag if old and old.lfs == lfs else None
        return {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid}

    return {"files": [how(item["path"], item["size"]) for item in request.json()["files"]]}


@route("POST", r"/(?P<kind>datasets/)?REPO\.git/info/lfs/objects/batch")
def lfs_batch(hub: HubServer, request: Request, repo: Repo) -> Response:
    hub.check_writer(request, repo.namespace)
    objects = [{"oid": item["oid"], "size": item["size"]} for item in request.json()["objects"]]
    for item in objects:
        if item["oid"] not in hub.objects:  # no actions: "I have it already"
            upload = {"href": f"{hub.storage}/{item['oid']}"}
            item["actions"] = {"upload": upload, "verify": {"href": f"{hub.endpoint}/verify"}}
    return _json({"transfer": "basic", "objects": objects})


@route("PUT", "/storage/(?P<sha256>[0-9a-f]{64})")
def put_object(hub: HubServer, request: Request, sha256: str) -> dict:
    if hub.store(request.body) != sha256:
        raise HubError(400, "The content's sha256 differs from the announced one")
    return {}


@route("POST", "/verify")
def verify_object(hub: HubServer, request: Request) -> dict:
    item = request.json()
    if len(hub.objects.get(item["oid"], b"")) != item["size"]:
        raise HubError(404, f"Object {item['oid']} isn't stored with {item['size']} bytes")
    return {}


@route("POST", "/api/KIND/REPO/commit/REV")
def create_commit(hub: HubServer, request: Request, repo: Repo, revision: str) -> dict:
    hub.check_writer(request, repo.namespace)
    if revision not in repo.branches:
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    head = repo.branches[revision]
    files, header = dict(head.files), {}
    for operation in map(json.loads, request.body.splitlines()):
        key, value = operation["key"], operation["value"]
        path = value.get("path", "")
        if key == "header":
            header = value
        elif key == "file":
            content = base64.b64decode(value["content"])
            hub.store(content)
            files[path] = File.regular(content)
        elif key == "lfsFile":
            if value["oid"] not in hub.objects:
                raise HubError(400, f"{path}: its LFS object was never uploaded")
            files[path] = File.pointer(value["oid"], len(hub.objects[value["oid"]]))
        elif key in ("deletedFile", "deletedFolder"):
            gone = [p for p in files if p == path or (key == "deletedFolder" and p.startswith(path.rstrip("/") + "/"))]
            if not gone:
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
            for p in gone:
                del files[p]
        else:
            raise HubError(400, f"This stand-in has no commit operation {key!r}")
    if header.get("parentCommit", head.oid) != head.oid:
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    commit = Commit(files, head, header["summary"], header.get("description", ""), request.user or "")
    repo.branches[revision] = commit
    prefix = "" if repo.kind == "models" else repo.kind + "/"
    return {"commitOid": commit.oid, "commitUrl": f"{hub.endpoint}/{prefix}{repo.id}/commit/{commit.oid}"}


# Downloads


@route("GET", "/storage/(?P<sha256>[0-9a-f]{64})")
def get_object(hub: HubServer, request: Request, sha256: str) -> Response:
    return Response(hub.objects[sha256], headers={"ETag": f'"{sha256}"'})


@route("GET", "/(?P<kind>datasets/)?REPO/resolve/REV/(?P<path>.+)")
def resolve(hub: HubServer, request: Request, repo: Repo, revision: str, path: str) -> Response:
    commit = repo.commit_at(revision)
    headers = {"X-Repo-Commit": commit.oid}
    file = commit.files.get(path)
    if file is None:
        # With X-Repo-Commit the client remembers that this commit lacks the file.
        headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
        return Response(b"Entry not found", 404, headers)
    if file.lfs:
        linked = {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(file.size)}
        return Response(b"", 302, {**headers, **linked, "Location": f"{hub.storage}/{file.sha256}"})
    return Response(hub.objects[file.sha256], headers={**headers, "ETag": f'"{file.etag}"'})


class _Handler(BaseHTTPRequestHandler):
    """Reads one request, asks the hub, writes the answer. Each runs in a thread of its own."""

    hub: HubServer
    protocol_version = "HTTP/1.1"  # keeps connections open
    disable_nagle_algorithm = True  # headers and body are two writes: without this each answer waits 40 ms

    def _serve(self) -> None:
        # The body is read even if it isn't wanted: what stays unread would be taken for the next request.
        body = self._read_chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self._read_sized()
        try:
            response = self.hub.answer(self.command, self.path, self.headers.get("Authorization"), body)
        except HubError as error:
            response = _json(error.body, error.status)
            response.headers["X-Error-Message"] = quote(str(error), safe=" .:,'/()")
            if error.code:
                response.headers["X-Error-Code"] = error.code
        except Exception as error:
            response = _json({"error": f"the stand-in Hub failed: {error!r}"}, 500)
        response = self._cut_to_range(response)
        self.send_response(response.status)
        for name, value in {**response.headers, "Content-Length": str(len(response.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _read_sized(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _read_chunks(self) -> bytes:
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _cut_to_range(self, response: Response) -> Response:
        """Honour "Range: bytes=first-last", by which downloads resume and datasets reads parts of a file."""
        wanted = re.match(r"bytes=(\d+)-(\d*)$", self.headers.get("Range", ""))
        if wanted is None or response.status != 200:
            return response
        total, first = len(response.body), int(wanted[1])
        if first >= total:
            return Response(b"", 416, {"Content-Range": f"bytes */{total}"})
        part = response.body[first : int(wanted[2]) + 1 if wanted[2] else total]
        span = {"Content-Range": f"bytes {first}-{first + len(part) - 1}/{total}"}
        return Response(part, 206, {**response.headers, **span})

    def log_message(self, format: str, *args: object) -> None:  # the test's output stays clean
        pass
