"""A small Hugging Face Hub for the tests: in memory, on the loopback interface, standard library only.

Whether a push can be loaded again only the real clients can tell, and no Hub that takes uploads can be installed. So
the tests run `huggingface_hub`, `transformers` and `datasets` unchanged against this server:

    with HubServer() as hub:
        result = hub.call(function_of_a_test_module, tmp_path)

The clients read HF_ENDPOINT once, when they are imported. `call` therefore runs the function in a fresh interpreter
with the variables of `environment`, and hands its result back.

As on the real Hub
- a repository is a history of commits; branches, tags and pull requests (`refs/pr/1`) are names for commits;
- a file that `.gitattributes` lists, or a binary or large one, goes to large file storage (LFS) under its sha256, and
  a commit is refused unless every such file arrived whole;
- anyone reads a public repository; writing needs a token. No token and an unknown token give 401, a token without the
  right to write here gives 403.

Left out: Xet storage, discussions, spaces, pages of results, and any opinion on the YAML of a card beyond its fences.
"""

import base64
import contextlib
import fnmatch
import hashlib
import inspect
import json
import os
import re
import secrets
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


LFS_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.onnx", "*.npy", "*.npz", "*.parquet", "*.arrow", "*.zip", "*.gz")
LFS_THRESHOLD = 10 * 1024 * 1024  # The Hub keeps no larger file in git itself.
GITATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS)


# ---- Answers


@dataclass
class Request:
    method: str
    path: str  # as sent, still percent-encoded: a revision such as refs/pr/1 is one segment
    query: dict[str, str]
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> dict:
        value = json.loads(self.body or b"{}")
        if not isinstance(value, dict):
            raise ValueError(f"the body must be a JSON object, got {type(value).__name__}")
        return value

    def flag(self, name: str) -> bool:
        return self.query.get(name, "").lower() in ("1", "true")


@dataclass
class Response:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})


class HubError(Exception):
    """An answer other than 200; `code` is what the clients turn into an exception of their own."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.headers["X-Error-Message"] = message.encode("ascii", "backslashreplace").decode()
        if code is not None:
            self.headers["X-Error-Code"] = code

    def response(self) -> Response:
        return json_response({"error": str(self)}, self.status, self.headers)


# ---- Repositories


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def git_hash(kind: str, data: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(data)}\0".encode() + data).hexdigest()


@dataclass(frozen=True)
class Blob:
    """The content of one file. Equal contents have equal identifiers, as in git."""

    data: bytes
    is_lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        """What git itself keeps in place of a file in large file storage."""
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        return text.encode()

    @cached_property
    def oid(self) -> str:
        return git_hash("blob", self.pointer if self.is_lfs else self.data)

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.oid


@dataclass(frozen=True)
class Commit:
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: Mapping[str, Blob]

    @cached_property
    def sha(self) -> str:
        files = {path: blob.oid for path, blob in sorted(self.files.items())}
        fields = [self.parent, self.title, self.message, self.author, self.date, files]
        return git_hash("commit", json.dumps(fields).encode())

    def in_folder(self, folder: str) -> dict[str, Blob]:
        """The files below `folder`, by their full path; all of them for the empty string."""
        prefix = folder.rstrip("/") + "/" if folder else ""
        return {path: blob for path, blob in self.files.items() if path.startswith(prefix)}


@dataclass
class Repository:
    kind: str  # "models" or "datasets", as in the paths of the API
    id: str
    private: bool = False
    created_at: str = field(default_factory=now)
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # full name, such as refs/heads/main, to commit

    @property
    def url_path(self) -> str:
        return self.id if self.kind == "models" else f"{self.kind}/{self.id}"

    def resolve(self, revision: str) -> Commit:
        """The commit that a branch, tag, full reference or sha names."""
        for name in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if name in self.refs:
                return self.commits[self.refs[name]]
        if revision in self.commits:
            return self.commits[revision]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def writable_ref(self, revision: str) -> str:
        """The full name of the branch or pull request that `revision` names: tags and commits never move."""
        for name in (f"refs/heads/{revision}", revision):
            if name in self.refs and not name.startswith("refs/tags/"):
                return name
        raise HubError(404, f"No branch to commit to: {revision}", "RevisionNotFound")

    def add_ref(self, name: str, commit: Commit) -> None:
        if name in self.refs:
            raise HubError(409, f"Reference already exists: {name}")
        self.refs[name] = commit.sha

    def delete_ref(self, name: str) -> None:
        if name not in self.refs:
            raise HubError(404, f"Reference not found: {name}", "RevisionNotFound")
        if name == "refs/heads/main":
            raise HubError(403, "The main branch cannot be deleted")
        del self.refs[name]

    def open_pull_request(self) -> str:
        number = 1 + sum(name.startswith("refs/pr/") for name in self.refs)
        name = f"refs/pr/{number}"
        self.add_ref(name, self.resolve("main"))
        return name

    def commit(self, ref: str, files: Mapping[str, Blob], title: str, message: str, author: str) -> Commit:
        """Moves `ref` to a new commit that holds exactly `files`."""
        commit = Commit(self.refs.get(ref), title, message, author, now(), dict(files))
        self.commits[commit.sha] = commit
        self.refs[ref] = commit.sha
        return commit

    def history(self, commit: Commit) -> list[Commit]:
        commits = [commit]
        while commits[-1].parent is not None:
            commits.append(self.commits[commits[-1].parent])
        return commits


# ---- The server


@dataclass
class _Fault:
    method: str
    path: str
    times: int
    status: int


class HubServer:
    """A Hub with one user, `user`, who may write to their own namespace and to those of `organizations`.

    `url`, `token` (may write) and `read_token` (may not) are what a client needs; `requests` lists every answered call
    as `(method, path, status)`.
    """

    def __init__(self, user: str = "tester", organizations: tuple[str, ...] = ("org",)):
        self.user = user
        self.organizations = organizations
        self.token = "hf_" + secrets.token_hex(16)
        self.read_token = "hf_" + secrets.token_hex(16)
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self.expected_uploads: dict[str, int] = {}  # sha256 to size, as announced by a client with a token
        self.requests: list[tuple[str, str, int]] = []
        self._faults: list[_Fault] = []
        self._lock = threading.RLock()
        self._http = _HTTPServer(("127.0.0.1", 0), _handler_class(self))
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def environment(self, home: Path | str) -> dict[str, str]:
        """The variables that lead a client here, with its caches below `home`; set them before it is imported."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token,
            "HF_HOME": str(Path(home) / "huggingface"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def call(
        self, function: Callable, home: Path, *arguments: Any, environment: Mapping[str, str] | None = None
    ) -> Any:
        """Runs a module-level function in a fresh interpreter whose clients talk to this Hub.

        `arguments` and the result travel as JSON. The interpreter runs in `home` and imports the function's module
        from its folder. Raises `AssertionError` with everything it printed when the function raises.
        """
        source = Path(inspect.getfile(function))
        answer = Path(home) / "answer.json"
        answer.unlink(missing_ok=True)
        # Variables of the person who runs the tests could point at the real Hub or switch the client offline.
        variables = {
            name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))
        }
        # The checkout comes along, so that the package under test need not be installed.
        folders = os.pathsep.join(map(str, (source.parent, Path(__file__).resolve().parents[1])))
        variables |= self.environment(home) | {"PYTHONPATH": folders, "OMP_NUM_THREADS": "1"} | (environment or {})
        process = subprocess.run(
            [sys.executable, "-c", _CALL, source.stem, function.__name__, json.dumps(arguments), str(answer)],
            cwd=home,
            env=variables,
            stdin=subprocess.DEVNULL,  # A client that asks for consent gets no answer.
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        if process.returncode != 0:
            raise AssertionError(f"{function.__name__} failed in its own interpreter:\n{process.stdout}")
        return json.loads(answer.read_text(encoding="utf-8"))

    def fail_next(self, method: str, times: int = 1, status: int = 500, path: str = "") -> None:
        """Answers the next `times` requests of `method` whose path holds a match of the pattern `path` by `status`."""
        with self._lock:
            self._faults.append(_Fault(method, path, times, status))

    def clear_faults(self) -> None:
        with self._lock:
            self._faults.clear()

    def repository(self, repo_id: str, kind: str = "models") -> Repository:
        try:
            return self.repositories[kind, repo_id]
        except KeyError:
            raise HubError(404, "Repository not found", "RepoNotFound") from None

    def files(self, repo_id: str, revision: str = "main", kind: str = "models") -> dict[str, bytes]:
        """The content of every file at `revision`, for a test to look at."""
        with self._lock:
            return {path: blob.data for path, blob in self.repository(repo_id, kind).resolve(revision).files.items()}

    def answer(self, request: Request) -> Response:
        """One request at a time, start to end: no reader ever sees half of a write."""
        with self._lock:
            try:
                response = self._injected_fault(request) or self._dispatch(request)
            except HubError as error:
                response = error.response()
            except (ValueError, KeyError, TypeError) as error:
                response = HubError(400, f"Malformed request: {error!r}").response()
            except Exception:
                # A fault of this server: the client that shows the text is in the test that has to be understood.
                response = json_response({"error": traceback.format_exc()}, 500)
            self.requests.append((request.method, request.path, response.status))
            return response

    def _injected_fault(self, request: Request) -> Response | None:
        for fault in self._faults:
            if fault.times > 0 and fault.method == request.method and re.search(fault.path, request.path):
                fault.times -= 1
                return json_response({"error": "injected by the test"}, fault.status)
        return None

    def _dispatch(self, request: Request) -> Response:
        for route in _ROUTES:
            match = route.pattern.fullmatch(request.path)
            # The reply to HEAD is the reply to GET; the handler leaves out the body.
            if match is None or request.method.replace("HEAD", "GET") != route.method:
                continue
            if route.needs is not None:
                self.check_token(request, route.needs)
            groups = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
            return route.function(self, request, **groups)
        raise HubError(501, f"This Hub for tests does not know {request.method} {request.path}")

    def check_token(self, request: Request, needs: str) -> str | None:
        """The role of the request's token, "read" or "write", or None without one; refuses what `needs` forbids."""
        header = request.headers.get("Authorization")
        role = {None: None, f"Bearer {self.token}": "write", f"Bearer {self.read_token}": "read"}.get(
            header, "unknown"
        )
        if role == "unknown":
            raise HubError(401, "Invalid credentials in Authorization header")
        if role is None and needs != "nothing":
            raise HubError(401, "Invalid username or password.")
        if role == "read" and needs == "write":
            raise HubError(403, "This token has no write access")
        return role

    def check_namespace(self, repo_id: str) -> None:
        namespace = repo_id.split("/")[0]
        if namespace not in (self.user, *self.organizations):
            raise HubError(403, f"You may not write to the namespace {namespace!r}")

    def visible_repository(self, request: Request, kind: str, repo_id: str) -> Repository:
        """The repository, unless the request may not know that it exists."""
        authenticated = self.check_token(request, "nothing") is not None
        found = self.repositories.get((kind, repo_id))
        if found is None or (found.private and not authenticated):
            # Without a token the Hub says 401 for both, so that nobody can probe for private repositories.
            raise HubError(404 if authenticated else 401, "Repository not found", "RepoNotFound")
        return found


# Runs in the interpreter that `HubServer.call` starts. The result goes to a file: libraries print to stdout.
_CALL = """
import importlib, json, sys
module, name, arguments, answer = sys.argv[1:]
result = getattr(importlib.import_module(module), name)(*json.loads(arguments))
with open(answer, "w", encoding="utf-8") as file:
    json.dump(result, file)
"""


class _HTTPServer(ThreadingHTTPServer):
    request_queue_size = 128  # With the default of 5, clients that connect at once wait a second for their retry.


def _handler_class(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # The clients keep connections open.

        def answer(self) -> None:
            body = self._read_body()
            if body is None:  # The client hung up half-way: there is nobody to answer and nothing to keep.
                self.close_connection = True
                return
            url = urlsplit(self.path)
            query = {name: values[-1] for name, values in parse_qs(url.query).items()}
            response = hub.answer(Request(self.command, url.path, query, self.headers, body))
            with contextlib.suppress(ConnectionError):
                self._send(response)

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

        def _read_body(self) -> bytes | None:
            if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
                return self._read_chunks()
            size = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(size)
            return body if len(body) == size else None

        def _read_chunks(self) -> bytes | None:
            chunks = []
            while line := self.rfile.readline().strip():
                size = int(line, 16)
                chunk = self.rfile.read(size)
                if len(chunk) < size or self.rfile.readline() != b"\r\n":
                    return None
                if size == 0:
                    return b"".join(chunks)
                chunks.append(chunk)
            return None

        def _send(self, response: Response) -> None:
            self.send_response(response.status)
            for name, value in response.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(response.body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(response.body)

        def log_message(self, format: str, *args: Any) -> None:
            """Silent: `hub.requests` keeps the log."""

    return Handler


# ---- Routes


@dataclass(frozen=True)
class _Route:
    method: str
    pattern: re.Pattern
    needs: str | None  # "nothing", "read" or "write" of the token; None for addresses that carry no token
    function: Callable[..., Response]


_ROUTES: list[_Route] = []
_SEGMENTS = {
    "{api}": r"/api/(?P<kind>models|datasets)/(?P<repo_id>[^/]+/[^/]+)",
    "{repository}": r"/(?:(?P<kind>datasets)/)?(?P<repo_id>[^/]+/[^/]+)",
    "{revision}": r"(?P<revision>[^/]+)",
    "{name}": r"(?P<name>[^/]+)",
    "{oid}": r"(?P<oid>[0-9a-f]{64})",
    "{path}": r"(?P<path>.+)",
    "{folder}": r"(?:/(?P<folder>.+))?",
}


def route(method: str, template: str, needs: str | None = "nothing") -> Callable:
    """Makes the decorated function answer `method` on paths of the form `template`."""
    pattern = template
    for name, segment in _SEGMENTS.items():
        pattern = pattern.replace(name, segment)

    def register(function: Callable[..., Response]) -> Callable[..., Response]:
        _ROUTES.append(_Route(method, re.compile(pattern), needs, function))
        return function

    return register


@route("GET", "/api/whoami-v2", needs="read")
def whoami(hub: HubServer, request: Request) -> Response:
    role = hub.check_token(request, "read")
    token = {"displayName": "test", "role": role}
    organizations = [{"type": "org", "name": name} for name in hub.organizations]
    auth = {"type": "access_token", "accessToken": token}
    return json_response({"type": "user", "name": hub.user, "orgs": organizations, "auth": auth})


@route("POST", "/api/validate-yaml")
def validate_yaml(hub: HubServer, request: Request) -> Response:
    content = request.json()["content"]
    if content.startswith("---\n") and "\n---" not in content[3:]:
        return json_response({"errors": [{"message": "the metadata block is not closed"}], "warnings": []}, 400)
    return json_response({"errors": [], "warnings": []})


@route("POST", "/api/repos/create", needs="write")
def create_repo(hub: HubServer, request: Request) -> Response:
    payload = request.json()
    kind, repo_id = _named_repository(hub, payload)
    hub.check_namespace(repo_id)
    private = payload.get("visibility") == "private" or bool(payload.get("private"))
    repository = Repository(kind, repo_id, private)
    answer = {"url": f"{hub.url}/{repository.url_path}", "name": repo_id}
    if (kind, repo_id) in hub.repositories:
        return json_response(answer | {"error": "You already created this repository"}, 409)
    files = {".gitattributes": Blob(GITATTRIBUTES.encode())}
    repository.commit("refs/heads/main", files, "initial commit", "", hub.user)
    hub.repositories[kind, repo_id] = repository
    return json_response(answer)


@route("DELETE", "/api/repos/delete", needs="write")
def delete_repo(hub: HubServer, request: Request) -> Response:
    kind, repo_id = _named_repository(hub, request.json())
    hub.check_namespace(repo_id)
    hub.repository(repo_id, kind)
    del hub.repositories[kind, repo_id]
    return json_response({})


def _named_repository(hub: HubServer, payload: dict) -> tuple[str, str]:
    kind = (payload.get("type") or "model") + "s"
    if kind not in ("models", "datasets"):
        raise HubError(400, f"This Hub for tests has no {kind}")
    return kind, f"{payload.get('organization') or hub.user}/{payload['name']}"


@route("GET", "{api}")
@route("GET", "{api}/revision/{revision}")
def repository_info(hub: HubServer, request: Request, kind: str, repo_id: str, revision: str = "main") -> Response:
    repository = hub.visible_repository(request, kind, repo_id)
    commit = repository.resolve(revision)
    info = {
        "id": repo_id,
        "author": repo_id.split("/")[0],
        "sha": commit.sha,
        "createdAt": repository.created_at,
        "lastModified": commit.date,
        "private": repository.private,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "siblings": [_sibling(path, blob, request.flag("blobs")) for path, blob in sorted(commit.files.items())],
    }
    return json_response(info | _card_fields(commit))


def _sibling(path: str, blob: Blob, with_blob: bool) -> dict:
    sibling: dict[str, Any] = {"rfilename": path}
    if with_blob:
        sibling |= {"size": len(blob.data), "blobId": blob.oid}
        if blob.is_lfs:
            sibling["lfs"] = {"sha256": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
    return sibling


def _card_fields(commit: Commit) -> dict[str, str]:
    """The two fields of a model card that `transformers.pipeline` asks the Hub for."""
    card = commit.files.get("README.md", Blob(b"")).data.decode()
    metadata = card.split("---")[1] if card.startswith("---") else ""
    return dict(re.findall(r"^(pipeline_tag|library_name): *(\S+)", metadata, flags=re.MULTILINE))


@route("GET", "{api}/refs")
def list_refs(hub: HubServer, request: Request, kind: str, repo_id: str) -> Response:
    refs = hub.visible_repository(request, kind, repo_id).refs

    def named(prefix: str) -> list[dict]:
        keep = "" if prefix != "refs/pr/" else prefix  # The name of a pull request is its full reference.
        return [
            {"name": keep + ref.removeprefix(prefix), "ref": ref, "targetCommit": sha}
            for ref, sha in refs.items()
            if ref.startswith(prefix)
        ]

    answer = {"branches": named("refs/heads/"), "converts": [], "tags": named("refs/tags/")}
    if request.flag("include_prs"):
        answer["pullRequests"] = named("refs/pr/")
    return json_response(answer)


@route("GET", "{api}/commits/{revision}")
def list_commits(hub: HubServer, request: Request, kind: str, repo_id: str, revision: str) -> Response:
    repository = hub.visible_repository(request, kind, repo_id)
    return json_response(
        [
            {
                "id": commit.sha,
                "title": commit.title,
                "message": commit.message,
                "authors": [{"user": commit.author}],
                "date": commit.date,
            }
            for commit in repository.history(repository.resolve(revision))
        ]
    )


@route("POST", "{api}/branch/{name}", needs="write")
def create_branch(hub: HubServer, request: Request, kind: str, repo_id: str, name: str) -> Response:
    repository = _writable_repository(hub, request, kind, repo_id)
    if name.startswith("refs/"):
        raise HubError(400, f"Invalid name for a branch: {name}")
    repository.add_ref(f"refs/heads/{name}", repository.resolve(request.json().get("startingPoint", "main")))
    return json_response({})


@route("DELETE", "{api}/branch/{name}", needs="write")
def delete_branch(hub: HubServer, request: Request, kind: str, repo_id: str, name: str) -> Response:
    _writable_repository(hub, request, kind, repo_id).delete_ref(f"refs/heads/{name}")
    return json_response({})


@route("POST", "{api}/tag/{revision}", needs="write")
def create_tag(hub: HubServer, request: Request, kind: str, repo_id: str, revision: str) -> Response:
    repository = _writable_repository(hub, request, kind, repo_id)
    repository.add_ref(f"refs/tags/{request.json()['tag']}", repository.resolve(revision))
    return json_response({})


@route("DELETE", "{api}/tag/{name}", needs="write")
def delete_tag(hub: HubServer, request: Request, kind: str, repo_id: str, name: str) -> Response:
    _writable_repository(hub, request, kind, repo_id).delete_ref(f"refs/tags/{name}")
    return json_response({})


def _writable_repository(hub: HubServer, request: Request, kind: str, repo_id: str) -> Repository:
    repository = hub.visible_repository(request, kind, repo_id)
    hub.check_namespace(repo_id)
    return repository


@route("GET", "{api}/tree/{revision}{folder}")
def list_tree(hub: HubServer, request: Request, kind: str, repo_id: str, revision: str, folder: str = "") -> Response:
    commit = hub.visible_repository(request, kind, repo_id).resolve(revision)
    inside = commit.in_folder(folder)
    if folder and not inside:
        raise HubError(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
    depth = len(PurePosixPath(folder).parts)
    entries = {path: _file_entry(path, blob) for path, blob in inside.items()}
    for path in inside:
        for parent in list(PurePosixPath(path).parents)[: -1 - depth]:
            entries[str(parent)] = _folder_entry(commit, str(parent))
    if not request.flag("recursive"):
        entries = {path: entry for path, entry in entries.items() if len(PurePosixPath(path).parts) == depth + 1}
    return json_response([entries[path] for path in sorted(entries)], headers={"X-Repo-Commit": commit.sha})


def _file_entry(path: str, blob: Blob) -> dict:
    entry = {"type": "file", "oid": blob.oid, "size": len(blob.data), "path": path}
    if blob.is_lfs:
        entry["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
    return entry


def _folder_entry(commit: Commit, folder: str) -> dict:
    content = [(path, blob.oid) for path, blob in sorted(commit.in_folder(folder).items())]
    return {"type": "directory", "oid": git_hash("tree", json.dumps(content).encode()), "size": 0, "path": folder}


@route("POST", "{api}/paths-info/{revision}")
def paths_info(hub: HubServer, request: Request, kind: str, repo_id: str, revision: str) -> Response:
    commit = hub.visible_repository(request, kind, repo_id).resolve(revision)
    entries = []
    for path in parse_qs(request.body.decode()).get("paths", []):
        if path in commit.files:
            entries.append(_file_entry(path, commit.files[path]))
        elif commit.in_folder(path):
            entries.append(_folder_entry(commit, path.rstrip("/")))
    return json_response(entries)


# ---- Download


@route("GET", "{repository}/resolve/{revision}/{path}")
def resolve_file(
    hub: HubServer, request: Request, repo_id: str, revision: str, path: str, kind: str = "models"
) -> Response:
    commit = hub.visible_repository(request, kind, repo_id).resolve(revision)
    headers = {"X-Repo-Commit": commit.sha}
    if path not in commit.files:
        raise HubError(404, "Entry not found", "EntryNotFound", headers)
    blob = commit.files[path]
    headers |= {"ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    if blob.is_lfs:
        headers |= {"X-Linked-ETag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.data))}
    return _with_range(Response(blob.data, 200, headers), request.headers.get("Range"))


def _with_range(response: Response, header: str | None) -> Response:
    """The part that a Range header asks for. As HTTP allows, a form not understood gets the whole."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header or "")
    if match is None or match.group() == "bytes=-":
        return response
    first, last = match.groups()
    size = len(response.body)
    start = int(first) if first else max(size - int(last), 0)
    stop = min(int(last) + 1, size) if first and last else size
    if start >= stop:
        raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
    headers = {**response.headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"}
    return Response(response.body[start:stop], 206, headers)


# ---- Upload: preupload says where each file goes, LFS files are stored, one commit names them all


@route("POST", "{api}/preupload/{revision}", needs="write")
def preupload(hub: HubServer, request: Request, kind: str, repo_id: str, revision: str) -> Response:
    commit = _writable_repository(hub, request, kind, repo_id).resolve(revision)
    patterns = _lfs_patterns(commit)
    answers = []
    for file in request.json()["files"]:
        name = file["path"].rsplit("/", 1)[-1]
        # git, too, takes a file for binary when its beginning holds a zero byte.
        is_lfs = (
            any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
            or file["size"] > LFS_THRESHOLD
            or b"\0" in base64.b64decode(file["sample"])
        )
        answer = {"path": file["path"], "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False}
        if file["path"] in commit.files:
            answer["oid"] = commit.files[file["path"]].etag
        answers.append(answer)
    return json_response({"files": answers})


def _lfs_patterns(commit: Commit) -> list[str]:
    lines = commit.files.get(".gitattributes", Blob(b"")).data.decode().splitlines()
    return [line.split()[0] for line in lines if "filter=lfs" in line.split()]


@route("POST", "{repository}\\.git/info/lfs/objects/batch", needs="write")
def lfs_batch(hub: HubServer, request: Request, repo_id: str, kind: str = "models") -> Response:
    _writable_repository(hub, request, kind, repo_id)
    objects = []
    for wanted in request.json()["objects"]:
        oid, size = wanted["oid"], wanted["size"]
        answer = {"oid": oid, "size": size}
        if oid not in hub.lfs_objects:
            hub.expected_uploads[oid] = size
            upload, verify = {"href": f"{hub.url}/_lfs/{oid}"}, {"href": f"{hub.url}/_lfs_verify"}
            answer["actions"] = {"upload": upload, "verify": verify}
        objects.append(answer)
    return json_response({"transfer": "basic", "objects": objects})


@route("PUT", "/_lfs/{oid}", needs=None)
def lfs_put(hub: HubServer, request: Request, oid: str) -> Response:
    # On the real Hub this is a signed address of a storage service: no token comes with it, the announcement counts.
    if oid not in hub.expected_uploads:
        raise HubError(403, "This upload was not announced")
    if len(request.body) != hub.expected_uploads[oid] or hashlib.sha256(request.body).hexdigest() != oid:
        raise HubError(400, "The content does not have the announced size and sha256")
    hub.lfs_objects[oid] = request.body
    del hub.expected_uploads[oid]
    return Response()


@route("POST", "/_lfs_verify", needs="write")
def lfs_verify(hub: HubServer, request: Request) -> Response:
    wanted = request.json()
    _lfs_blob(hub, wanted["oid"], wanted["size"])
    return json_response({})


def _lfs_blob(hub: HubServer, oid: str, size: int | None) -> Blob:
    data = hub.lfs_objects.get(oid)
    if data is None or size not in (None, len(data)):
        raise HubError(400, f"No object of {size} bytes with sha256 {oid} was uploaded")
    return Blob(data, is_lfs=True)


@route("POST", "{api}/commit/{revision}", needs="write")
def create_commit(hub: HubServer, request: Request, kind: str, repo_id: str, revision: str) -> Response:
    repository = _writable_repository(hub, request, kind, repo_id)
    parent = repository.resolve(repository.writable_ref(revision))
    header, *operations = [json.loads(line) for line in request.body.splitlines()]
    if header["key"] != "header":
        raise HubError(400, "A commit begins with its header")
    if header["value"].get("parentCommit") not in (None, parent.sha):
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    files = dict(parent.files)
    for operation in operations:
        _apply(hub, files, operation["key"], operation["value"])
    # Everything that can fail is behind us: only now does the repository change.
    summary, description = header["value"]["summary"], header["value"].get("description", "")
    ref = repository.open_pull_request() if request.flag("create_pr") else repository.writable_ref(revision)
    commit = repository.commit(ref, files, summary, description, hub.user)
    answer = {"success": True, "commitOid": commit.sha}
    answer["commitUrl"] = f"{hub.url}/{repository.url_path}/commit/{commit.sha}"
    if request.flag("create_pr"):
        answer["pullRequestUrl"] = f"{hub.url}/{repository.url_path}/discussions/{ref.rsplit('/', 1)[-1]}"
    return json_response(answer)


def _apply(hub: HubServer, files: dict[str, Blob], key: str, value: dict) -> None:
    """Carries out one operation of a commit on `files`."""
    path = value["path"]
    if not set(path.rstrip("/").split("/")).isdisjoint({"", ".", "..", ".git"}):
        raise HubError(400, f"Invalid path: {path!r}")
    if key == "file":
        files[path] = Blob(base64.b64decode(value["content"], validate=True))
    elif key == "lfsFile":
        files[path] = _lfs_blob(hub, value["oid"], value.get("size"))
    elif key == "deletedFile":
        _delete(files, [path] if path in files else [], path)
    elif key == "deletedFolder":
        folder = path.rstrip("/") + "/"
        _delete(files, [name for name in files if name.startswith(folder)], path)
    else:
        raise HubError(400, f"Unknown operation: {key!r}")


def _delete(files: dict[str, Blob], names: list[str], path: str) -> None:
    if not names:
        raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
    for name in names:
        del files[name]
