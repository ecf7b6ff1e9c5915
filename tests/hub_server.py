# SPDX-License-Identifier: Apache-2.0
"""A small Hugging Face Hub that lives inside the test process.

``HubServer`` listens on 127.0.0.1 and answers the requests that an unmodified ``huggingface_hub`` client sends:
accounts, repositories, commits, large-file uploads, downloads, model pages and collections. Everything is kept in
memory and forgotten when the server stops.

    with HubServer(users={"hf_test_token": {"name": "alice", "orgs": ["org"]}}) as hub:
        api = HfApi(endpoint=hub.endpoint, token="hf_test_token")
        api.create_repo("org/model")
        hub.fail(method="POST", path=r"/commit/main$", status=500)   # the next commit breaks ...
        hub.repo("org/model").commits                                # ... and here is what the Hub then holds

The client must not use Xet (set ``HF_HUB_DISABLE_XET=1``): only the plain LFS protocol is spoken here. A request the
server does not know is answered with 501 rather than 404, so that a gap in this file is loud instead of looking like
a missing repository.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import os
import re
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.message import Message
from fnmatch import fnmatch
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypedDict
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml


REGULAR_FILE_LIMIT = 10 * 1024 * 1024  # bytes; the Hub keeps larger files out of git
NOTE_LIMIT = 500  # characters in the note of a collection item

_LFS_PATTERNS = (
    "*.arrow *.bin *.ckpt *.gguf *.gz *.h5 *.jpg *.npy *.npz *.onnx *.parquet *.png *.pt *.pth *.safetensors *.zip"
)
_GITATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in _LFS_PATTERNS.split())
_CARD_YAML = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n?---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_REPO_NAME = re.compile(r"[\w.-]{1,96}")
_INTERNAL_ERROR = "Internal Error - We're working hard to fix this as soon as possible!"


class User(TypedDict, total=False):
    """An account: its name, and the organizations it belongs to."""

    name: str
    orgs: list[str]


class Request(NamedTuple):
    """One line of the request log. ``status`` is None when the connection was cut instead of answered."""

    method: str
    path: str
    status: int | None


class Problem(Exception):
    """A refusal, in the form the client turns into an exception: a status, an error code and a message."""

    def __init__(self, status: int, message: str, code: str | None = None, body: dict | None = None, **headers: str):
        super().__init__(message)
        first_line = message.partition("\n")[0].encode("ascii", "replace").decode()  # what a header can carry
        self.reply = json_reply({"error": message, **(body or {})}, status, {"X-Error-Message": first_line})
        self.reply.headers |= {"X-Error-Code": code} if code else {}
        self.reply.headers |= {name.replace("_", "-"): value for name, value in headers.items()}


@dataclass
class Reply:
    """An answer about to be sent."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Call:
    """One request, read in full: the handlers below see only this and never the socket."""

    method: str
    query: dict[str, list[str]]
    headers: Message
    body: bytes
    user: User | None
    args: dict[str, str]  # the named parts of the path; "" for one that is absent

    def json(self) -> dict[str, Any]:
        return json.loads(self.body)

    def wants(self, flag: str) -> bool:
        """Whether a yes-or-no query parameter is set."""
        return self.query.get(flag, ["false"])[-1].lower() not in ("false", "0")


@dataclass
class Fault:
    """A failure that was ordered with ``HubServer.fail`` and still has ``times`` requests to hit."""

    method: str
    path: re.Pattern[str]
    status: int
    drop: bool
    lose_reply: bool
    times: int


@dataclass(frozen=True)
class Blob:
    """The bytes of one file, and whether the Hub keeps them in git or in large-file storage."""

    data: bytes
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        """What git itself stores for a large file."""
        lines = ["version https://git-lfs.github.com/spec/v1", f"oid sha256:{self.sha256}", f"size {len(self.data)}"]
        return "".join(f"{line}\n" for line in lines).encode()

    @cached_property
    def git_oid(self) -> str:
        return _git_oid("blob", self.pointer if self.lfs else self.data)

    @property
    def oid(self) -> str:
        """The id by which the client tells whether its own copy is the same."""
        return self.sha256 if self.lfs else self.git_oid


@dataclass(frozen=True)
class Commit:
    """One immutable state of a repository."""

    oid: str
    parent: str | None
    title: str
    description: str
    author: str
    date: datetime
    files: Mapping[str, Blob]

    @cached_property
    def ids(self) -> dict[str, str]:
        """An id for the content of every file and folder; the root folder is ``""``."""
        files = {path: blob.git_oid for path, blob in self.files.items()}
        parts: dict[str, list[str]] = {folder: [] for folder in _folders(self.files)}
        for path in sorted(files):
            for folder in _folders([path]):
                parts[folder].append(f"{path} {files[path]}")
        return files | {folder: _git_oid("tree", "\n".join(lines).encode()) for folder, lines in parts.items()}

    def summary(self) -> dict[str, Any]:
        return {"id": self.oid, "title": self.title, "date": _timestamp(self.date)}


class Repo:
    """A model, dataset or Space repository: its commits, its branches and tags, and its large files."""

    def __init__(self, type: str, id: str, private: bool, sdk: str | None) -> None:
        self.type = type
        self.id = id
        self.owner = id.partition("/")[0]
        self.private = private
        self.sdk = sdk
        self.created = _now()
        self.object_id = secrets.token_hex(12)
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.lfs: dict[str, bytes] = {}  # uploaded large files by sha256, whether or not a commit uses them yet
        self._commits: dict[str, Commit] = {}
        self.add_commit("main", "system", "initial commit", "", {".gitattributes": Blob(_GITATTRIBUTES.encode())})

    @property
    def head(self) -> str:
        """The id of the newest commit of ``main``."""
        return self.branches["main"]

    @property
    def commits(self) -> list[Commit]:
        """The history of ``main``, newest last. The first one is the Hub's own, with ``.gitattributes``."""
        return list(self.history(self.at("main")))[::-1]

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """The content of every file at a branch, tag or commit."""
        return {path: blob.data for path, blob in self.at(revision).files.items()}

    def at(self, revision: str) -> Commit:
        """The commit that a branch, a tag or a commit id stands for."""
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self._commits:
            raise Problem(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self._commits[oid]

    def history(self, commit: Commit) -> Iterator[Commit]:
        """The commit and its ancestors, newest first."""
        while True:
            yield commit
            if commit.parent is None:
                return
            commit = self._commits[commit.parent]

    def last_change(self, commit: Commit, path: str) -> Commit:
        """The commit that gave a file or folder the content it has in ``commit``."""
        found = commit
        for older in self.history(commit):
            if older.ids.get(path) != commit.ids[path]:
                break
            found = older
        return found

    def add_commit(self, branch: str, author: str, title: str, description: str, files: dict[str, Blob]) -> Commit:
        """Move a branch forward. Nothing of the commit is visible before the last line."""
        parent, date = self.branches.get(branch), _now()
        tree = sorted((path, blob.git_oid) for path, blob in files.items())
        identity = json.dumps([self.object_id, parent, title, description, author, str(date), tree])
        oid = _git_oid("commit", identity.encode())
        self._commits[oid] = commit = Commit(oid, parent, title, description, author, date, dict(files))
        self.branches[branch] = oid
        return commit


@dataclass
class Collection:
    """A named list of repositories. Its id outlives its title, as on the Hub, so old slugs keep working."""

    owner: str
    title: str
    private: bool
    description: str | None
    theme: str = "orange"
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    items: list[dict[str, Any]] = field(default_factory=list)
    updated: datetime = field(default_factory=lambda: _now())

    @property
    def slug(self) -> str:
        words = re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")
        return f"{self.owner}/{words}-{self.id}"

    def page(self) -> dict[str, Any]:
        """The collection as JSON."""
        return {
            "slug": self.slug,
            "title": self.title,
            "description": self.description,
            "owner": self.owner,
            "private": self.private,
            "theme": self.theme,
            "upvotes": 0,
            "position": 0,
            "lastUpdated": _timestamp(self.updated),
            "items": [{**item, "position": place} for place, item in enumerate(self.items)],
        }


Handler = Callable[["HubServer", Call], Any]
_ROUTES: list[tuple[str, re.Pattern[str], Handler]] = []


def _route(method: str, path: str) -> Callable[[Handler], Handler]:
    """Register a handler. ``{api}`` and ``{web}`` are the two ways in which the Hub's paths name a repository."""
    repo = r"(?P<repo>[^/]+(?:/[^/]+)?)"
    path = path.replace("{api}", rf"/api/(?P<type>model|dataset|space)s/{repo}")
    path = path.replace("{web}", rf"/(?:(?P<type>dataset|space)s/)?{repo}")

    def register(handler: Handler) -> Handler:
        _ROUTES.append((method, re.compile(path), handler))
        return handler

    return register


class HubServer:
    """The server. ``users`` maps each accepted token to its account."""

    def __init__(self, users: Mapping[str, User]) -> None:
        self.users = dict(users)
        self.requests: list[Request] = []
        self._faults: list[Fault] = []
        self._repos: dict[tuple[str, str], Repo] = {}
        self._collections: dict[str, Collection] = {}
        self._upload_key = secrets.token_bytes(16)
        self._lock = threading.RLock()  # held while a handler runs, so that each request is one atomic step
        self._http = _HTTPServer(("127.0.0.1", 0), _HTTPHandler)
        self._http.hub = self
        self.endpoint = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._http.close_connections()

    def repo(self, id: str, type: str = "model") -> Repo:
        """What the Hub holds for a repository, for a test to look at."""
        with self._lock:
            if (type, id) not in self._repos:
                raise LookupError(f"the test hub has no {type} repository {id!r}")
            return self._repos[type, id]

    def fail(
        self,
        *,
        path: str,
        method: str = ".*",
        status: int = 500,
        drop: bool = False,
        lose_reply: bool = False,
        times: int = 1,
    ) -> None:
        """Break the next ``times`` requests whose method and path (without the query) match.

        By default they are answered with ``status`` and change nothing. With ``drop``, the connection is cut halfway
        through the data: through the upload if the request has a body, and through the download if it has none. With
        ``lose_reply``, the request is carried out but the connection is cut before the answer.
        """
        with self._lock:
            self._faults.append(Fault(method, re.compile(path), status, drop, lose_reply, times))

    def env(self, home: Path, token: str | None = None) -> dict[str, str]:
        """The environment of a subprocess that uses this server, with a Hugging Face home of its own."""
        theirs = ("HF_", "HUGGING", "TRANSFORMERS_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(theirs)}
        quiet = {f"HF_HUB_DISABLE_{what}": "1" for what in ("XET", "TELEMETRY", "UPDATE_CHECK", "PROGRESS_BARS")}
        ours = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), **quiet}
        return kept | ours | ({"HF_TOKEN": token} if token else {})

    # Plumbing

    def take_fault(self, method: str, path: str) -> Fault | None:
        """The failure ordered for this request, if any; it counts as used."""
        with self._lock:
            for fault in self._faults:
                if fault.times and re.fullmatch(fault.method, method) and fault.path.search(path):
                    fault.times -= 1
                    return fault
        return None

    def log(self, method: str, path: str, status: int | None) -> None:
        with self._lock:
            self.requests.append(Request(method, path, status))

    def answer(self, method: str, url: str, headers: Message, body: bytes) -> Reply:
        """Find the handler of a request and run it."""
        path, query = urlsplit(url).path, parse_qs(urlsplit(url).query)
        try:
            user = self._authenticate(headers.get("Authorization"))
            for verb, pattern, handler in _ROUTES:
                match = pattern.fullmatch(path)
                if match and verb == ("GET" if method == "HEAD" else method):
                    # Split first, decode after: an encoded slash belongs to a revision or file name.
                    args = {name: unquote(value or "") for name, value in match.groupdict().items()}
                    with self._lock:
                        result = handler(self, Call(method, query, headers, body, user, args))
                    return result if isinstance(result, Reply) else json_reply(result)
            raise Problem(501, f"The test hub does not cover {method} {path}")
        except Problem as problem:
            return problem.reply

    def _authenticate(self, authorization: str | None) -> User | None:
        if authorization is None:
            return None
        user = self.users.get(authorization.removeprefix("Bearer "))
        if user is None:  # the Hub refuses a wrong token everywhere, on public pages too
            raise Problem(401, "Invalid credentials in Authorization header")
        return user

    @staticmethod
    def _namespaces(user: User | None) -> list[str]:
        return [user["name"], *user.get("orgs", [])] if user else []

    def _signed_in(self, call: Call) -> User:
        if call.user is None:
            raise Problem(401, "Invalid username or password.")
        return call.user

    def _writer(self, call: Call, namespace: str, refusal: str) -> User:
        """The user of the call, if allowed to write to a namespace."""
        user = self._signed_in(call)
        if namespace not in self._namespaces(user):
            raise Problem(403, refusal)
        return user

    def _readable(self, call: Call) -> Repo:
        """The repository named by the path, if the caller may see it."""
        repo = self._repos.get((call.args["type"] or "model", call.args["repo"]))
        if repo is None or (repo.private and repo.owner not in self._namespaces(call.user)):
            if call.user is None:  # the Hub does not tell strangers whether a repository is private or missing
                raise Problem(401, "Invalid username or password.", "RepoNotFound")
            raise Problem(404, "Repository not found", "RepoNotFound")
        return repo

    def _writable(self, call: Call) -> Repo:
        repo = self._readable(call)
        self._writer(call, repo.owner, "Forbidden: you must use a write token to upload to a repository.")
        return repo

    def _url(self, repo: Repo) -> str:
        return f"{self.endpoint}/{'' if repo.type == 'model' else repo.type + 's/'}{repo.id}"

    # Accounts and repositories

    @_route("GET", "/api/agent-harnesses")
    def _harnesses(self, call: Call) -> dict:
        """No known coding agents, so that the client behaves the same whoever runs the tests."""
        return {"standardEnvVars": [], "harnesses": {}}

    @_route("GET", "/api/whoami-v2")
    def _whoami(self, call: Call) -> dict:
        user = self._signed_in(call)
        orgs = [{"type": "org", "name": org, "fullname": org, "roleInOrg": "write"} for org in user.get("orgs", [])]
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return {"type": "user", "name": user["name"], "fullname": user["name"], "orgs": orgs, "auth": auth}

    @_route("POST", "/api/repos/create")
    def _create_repo(self, call: Call) -> dict:
        form = call.json()
        type, name = form.get("type") or "model", str(form.get("name"))
        owner = form.get("organization") or self._signed_in(call)["name"]
        self._writer(call, owner, f'You don\'t have the rights to create a {type} under the namespace "{owner}"')
        if type not in ("model", "dataset", "space") or not _REPO_NAME.fullmatch(name):
            raise Problem(400, f"Invalid repository type or name: {type} {name}")
        if type == "space" and not form.get("sdk"):
            raise Problem(400, "A Space needs an sdk")
        if existing := self._repos.get((type, f"{owner}/{name}")):
            raise Problem(409, f"You already created this {type} repo", body={"url": self._url(existing)})
        repo = Repo(type, f"{owner}/{name}", form.get("visibility") == "private", form.get("sdk"))
        self._repos[type, repo.id] = repo
        return {"url": self._url(repo), "name": repo.id, "id": repo.object_id}

    @_route("DELETE", "/api/repos/delete")
    def _delete_repo(self, call: Call) -> dict:
        form = call.json()
        owner = form.get("organization") or self._signed_in(call)["name"]
        call.args = {"type": form.get("type") or "model", "repo": f"{owner}/{form.get('name')}"}
        repo = self._writable(call)
        del self._repos[repo.type, repo.id]
        return {}

    @_route("PUT", "{api}/settings")
    def _settings(self, call: Call) -> dict:
        repo, form = self._writable(call), call.json()
        if form.get("visibility") not in ("public", "private") or len(form) > 1:
            raise Problem(501, "The test hub covers no setting but the visibility, public or private")
        repo.private = form["visibility"] == "private"
        return {"private": repo.private}

    # Uploads, in the order in which the client makes them

    @_route("POST", "/api/validate-yaml")
    def _validate_yaml(self, call: Call) -> Reply:
        errors, warnings = check_card(call.json()["content"])
        report = {"errors": [{"message": error} for error in errors], "warnings": [{"message": w} for w in warnings]}
        return json_reply(report, 400 if errors else 200)

    @_route("POST", "{api}/preupload/(?P<revision>[^/]+)")
    def _preupload(self, call: Call) -> dict:
        """Say of each file how to upload it, and which version of it the branch already has."""
        repo, form = self._writable(call), call.json()
        head = repo.at(call.args["revision"])
        attributes = _text(head, ".gitattributes").splitlines()
        lfs_rules = [words[0] for line in attributes if "filter=lfs" in (words := line.split())]
        ignore_rules = form.get("gitIgnore", _text(head, ".gitignore")).split()
        answers = []
        for file in form["files"]:
            path, sample = file["path"], base64.b64decode(file["sample"])
            large = file["size"] > REGULAR_FILE_LIMIT or b"\0" in sample or _matches(path, lfs_rules)
            answer = {"path": path, "uploadMode": "lfs" if large else "regular"}
            answer["shouldIgnore"] = _matches(path, ignore_rules)
            answers.append(answer | ({"oid": head.files[path].oid} if path in head.files else {}))
        return {"files": answers, "commitOid": head.oid}

    @_route("POST", r"{web}\.git/info/lfs/objects/batch")
    def _lfs_batch(self, call: Call) -> dict:
        """Say where to upload each large file; one that is already stored gets no upload action."""
        repo, form = self._writable(call), call.json()
        if form["operation"] != "upload":
            raise Problem(501, "The test hub covers only LFS uploads")
        objects = []
        for wanted in form["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            path = f"/lfs-upload/{repo.type}s/{repo.id}/{oid}/{size}"
            upload = {"href": f"{self.endpoint}{path}?X-Signature={self._signature(path)}"}
            verify = {"href": f"{self._url(repo)}.git/info/lfs/objects/verify"}
            actions = {} if oid in repo.lfs else {"actions": {"upload": upload, "verify": verify}}
            objects.append({"oid": oid, "size": size, "authenticated": True, **actions})
        return {"transfer": "basic", "objects": objects}

    def _signature(self, path: str) -> str:
        return hmac.new(self._upload_key, path.encode(), "sha256").hexdigest()

    @_route("PUT", r"(?P<path>/lfs-upload/(?P<type>\w+)s/(?P<repo>[^/]+/[^/]+)/(?P<oid>\w+)/(?P<size>\d+))")
    def _lfs_put(self, call: Call) -> Reply:
        """Take the bytes of a large file. The signed URL is the only credential, as with a storage bucket."""
        if not hmac.compare_digest(call.query.get("X-Signature", [""])[0], self._signature(call.args["path"])):
            raise Problem(403, "SignatureDoesNotMatch")
        if hashlib.sha256(call.body).hexdigest() != call.args["oid"] or len(call.body) != int(call.args["size"]):
            raise Problem(400, "BadDigest: the content does not have the announced SHA-256 and size")
        self._repos[call.args["type"], call.args["repo"]].lfs[call.args["oid"]] = call.body
        return Reply()

    @_route("POST", r"{web}\.git/info/lfs/objects/verify")
    def _lfs_verify(self, call: Call) -> dict:
        repo, form = self._writable(call), call.json()
        if form.get("oid") not in repo.lfs or len(repo.lfs[form["oid"]]) != form.get("size"):
            raise Problem(404, "Object does not exist on the server or has another size")
        return {"message": "OK"}

    @_route("POST", "{api}/commit/(?P<branch>[^/]+)")
    def _commit(self, call: Call) -> dict:
        """Apply a list of changes to a branch: all of them, or none."""
        repo, branch = self._writable(call), call.args["branch"]
        if call.wants("create_pr"):
            raise Problem(403, "Discussions are disabled for this repo")
        if branch not in repo.branches:
            raise Problem(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        (_, header), *changes = [(line["key"], line["value"]) for line in map(json.loads, call.body.splitlines())]
        if not repo.branches[branch].startswith(header.get("parentCommit", "")):
            raise Problem(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.at(branch).files)
        for key, value in changes:
            _apply(files, repo, key, value)
        if clash := _folders(files) & files.keys():
            raise Problem(400, f"Both a file and a folder: {', '.join(sorted(clash))}")
        errors, _ = check_card(files["README.md"].data.decode() if "README.md" in files else "")
        if errors:
            raise Problem(400, "Invalid metadata in README.md.\n" + "\n".join(errors))
        author, title, description = self._signed_in(call)["name"], header["summary"], header.get("description", "")
        commit = repo.add_commit(branch, author, title, description, files)
        return {"success": True, "commitOid": commit.oid, "commitUrl": f"{self._url(repo)}/commit/{commit.oid}"}

    # Reading

    @_route("GET", "{web}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def _resolve(self, call: Call) -> Reply:
        """A file, whole or in part. Large files come from here too: there is no second storage host to redirect to."""
        commit, path = self._readable(call).at(call.args["revision"]), call.args["path"]
        if path not in commit.files:
            # The commit id lets the client remember that this commit has no such file.
            raise Problem(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.oid)
        blob = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes"}
        headers["Content-Type"] = "application/octet-stream" if blob.lfs else "text/plain; charset=utf-8"
        headers["Content-Disposition"] = f"inline; filename*=UTF-8''{quote(path.rpartition('/')[2])}"
        if blob.lfs:
            headers |= {"X-Linked-ETag": f'"{blob.oid}"', "X-Linked-Size": str(len(blob.data))}
        wanted, size = re.fullmatch(r"bytes=(\d*)-(\d*)", call.headers.get("Range", "")), len(blob.data)
        if wanted is None or wanted[0] == "bytes=-":
            return Reply(200, blob.data, headers)
        start, end = (int(text) if text else None for text in wanted.groups())
        first = start if start is not None else max(size - (end or 0), 0)
        last = size - 1 if start is None or end is None else min(end, size - 1)
        if first > last:
            raise Problem(416, "Range Not Satisfiable", Content_Range=f"bytes */{size}")
        return Reply(206, blob.data[first : last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{size}"})

    @_route("GET", "{api}(?:/revision/(?P<revision>[^/]+))?")
    def _repo_info(self, call: Call) -> dict:
        repo = self._readable(call)
        info = self._page(repo, repo.at(call.args["revision"] or "main"), blobs=call.wants("blobs"))
        if wanted := call.query.get("expand"):
            return {name: info[name] for name in ("_id", "id", *wanted) if name in info}
        return info

    @_route("GET", "/api/(?P<type>model|dataset|space)s")
    def _list_repos(self, call: Call) -> list[dict]:
        author, pages = call.query.get("author", [""])[0], []
        for repo in self._repos.values():
            hidden = repo.private and repo.owner not in self._namespaces(call.user)
            if repo.type == call.args["type"] and author in ("", repo.owner) and not hidden:
                pages.append(self._page(repo, repo.at("main"), blobs=False))
        return pages

    def _page(self, repo: Repo, commit: Commit, blobs: bool) -> dict[str, Any]:
        """What the Hub knows about a repository at a commit."""
        try:
            card = card_metadata(_text(commit, "README.md")) or {}
        except ValueError:
            card = {}
        siblings = []
        for path, blob in sorted(commit.files.items()):
            lfs = {"lfs": {"sha256": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}}
            detail = {"blobId": blob.git_oid, "size": len(blob.data), **(lfs if blob.lfs else {})}
            siblings.append({"rfilename": path, **(detail if blobs else {})})
        page = {"_id": repo.object_id, "id": repo.id, "author": repo.owner, "sha": commit.oid, "private": repo.private}
        page |= {"createdAt": _timestamp(repo.created), "lastModified": _timestamp(commit.date), "siblings": siblings}
        page |= {"tags": list(_tags(card)), "gated": False, "disabled": False, "downloads": 0, "likes": 0}
        page |= {"cardData": card} if card else {}
        page |= {key: card[key] for key in ("library_name", "pipeline_tag", "model-index") if key in card}
        return page | ({"sdk": repo.sdk} if repo.sdk else {})

    @_route("GET", "{api}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?")
    def _tree(self, call: Call) -> list[dict]:
        repo, folder = self._readable(call), call.args["path"].strip("/")
        commit = repo.at(call.args["revision"])
        if folder not in commit.ids or folder in commit.files:
            raise Problem(404, f"{folder} does not exist on {call.args['revision']}", "EntryNotFound")
        prefix = f"{folder}/" if folder else ""
        inside = [path for path in sorted(commit.ids) if path.startswith(prefix) and path not in ("", folder)]
        if not call.wants("recursive"):
            inside = [path for path in inside if "/" not in path.removeprefix(prefix)]
        return [_entry(repo, commit, path, call.wants("expand")) for path in inside]

    @_route("POST", "{api}/paths-info/(?P<revision>[^/]+)")
    def _paths_info(self, call: Call) -> list[dict]:
        repo, form = self._readable(call), parse_qs(call.body.decode())
        commit, expand = repo.at(call.args["revision"]), form.get("expand") == ["true"]
        paths = [path.strip("/") for path in form.get("paths", [])]
        return [_entry(repo, commit, path, expand) for path in paths if path and path in commit.ids]

    @_route("GET", "{api}/commits/(?P<revision>[^/]+)")
    def _commits(self, call: Call) -> list[dict]:
        repo = self._readable(call)
        history = repo.history(repo.at(call.args["revision"]))
        return [c.summary() | {"message": c.description, "authors": [{"user": c.author}]} for c in history]

    @_route("GET", "{api}/refs")
    def _refs(self, call: Call) -> dict:
        repo = self._readable(call)
        kinds = {"branches": ("heads", repo.branches), "tags": ("tags", repo.tags)}
        return {"converts": [], "pullRequests": []} | {
            kind: [{"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": oid} for name, oid in refs.items()]
            for kind, (folder, refs) in kinds.items()
        }

    @_route("POST", "{api}/tag/(?P<revision>[^/]+)")
    def _create_tag(self, call: Call) -> dict:
        repo, tag = self._writable(call), call.json()["tag"]
        return self._create_ref(repo, repo.tags, tag, repo.at(call.args["revision"]))

    @_route("POST", "{api}/branch/(?P<branch>[^/]+)")
    def _create_branch(self, call: Call) -> dict:
        repo, start = self._writable(call), call.json().get("startingPoint", "main")
        return self._create_ref(repo, repo.branches, call.args["branch"], repo.at(start))

    def _create_ref(self, repo: Repo, refs: dict[str, str], name: str, commit: Commit) -> dict:
        if name in repo.branches or name in repo.tags:
            raise Problem(409, f"Reference already exists: {name}")
        refs[name] = commit.oid
        return {}

    # Collections

    @_route("POST", "/api/collections")
    def _create_collection(self, call: Call) -> dict:
        form = call.json()
        owner, title = form.get("namespace") or self._signed_in(call)["name"], str(form.get("title") or "")
        self._writer(call, owner, f'You don\'t have the rights to create a collection under the namespace "{owner}"')
        if not title:
            raise Problem(400, "A collection needs a title")
        for collection in self._collections.values():
            if (collection.owner, collection.title) == (owner, title):
                raise Problem(409, "This collection already exists", body={"slug": collection.slug})
        collection = Collection(owner, title, bool(form.get("private")), form.get("description"))
        self._collections[collection.id] = collection
        return collection.page()

    @_route("GET", "/api/collections")
    def _list_collections(self, call: Call) -> list[dict]:
        owners, wanted = call.query.get("owner", []), call.query.get("item", [])
        pages = []
        for collection in self._collections.values():
            hidden = collection.private and collection.owner not in self._namespaces(call.user)
            held = {f"{item['type']}s/{item['id']}" for item in collection.items}
            if not hidden and (not owners or collection.owner in owners) and (not wanted or held & set(wanted)):
                page = collection.page()
                page["items"] = page["items"][:4]  # the Hub lists no more than four items of each
                del page["position"]  # the client counts for itself here
                pages.append(page)
        return pages

    @_route("GET", "/api/collections/(?P<slug>[^/]+/[^/]+)")
    def _get_collection(self, call: Call) -> dict:
        return self._collection(call).page()

    @_route("PATCH", "/api/collections/(?P<slug>[^/]+/[^/]+)")
    def _update_collection(self, call: Call) -> dict:
        collection = self._collection(call, write=True)
        for key, value in call.json().items():
            if key not in ("title", "description", "private", "theme"):
                raise Problem(501, f"The test hub cannot update the {key} of a collection")
            setattr(collection, key, value)
        collection.updated = _now()
        return {"success": True, "data": collection.page()}

    @_route("POST", "/api/collections/(?P<slug>[^/]+/[^/]+)/items")
    def _add_item(self, call: Call) -> dict:
        collection, form = self._collection(call, write=True), call.json()
        type, id, note = form["item"]["type"], form["item"]["id"], form.get("note")
        if type in ("model", "dataset", "space"):
            call.args = {"type": type, "repo": id}
            self._readable(call)
        elif type != "paper":
            raise Problem(501, f"The test hub has no collection items of type {type}")
        if any((item["type"], item["id"]) == (type, id) for item in collection.items):
            raise Problem(409, "Item already in collection")
        if note and len(note) > NOTE_LIMIT:
            raise Problem(400, f"A note has at most {NOTE_LIMIT} characters")
        item = {"_id": secrets.token_hex(12), "type": type, "id": id}
        collection.items.append(item | ({"note": {"text": note, "html": note}} if note else {}))
        collection.updated = _now()
        return collection.page()

    @_route("DELETE", "/api/collections/(?P<slug>[^/]+/[^/]+)/items/(?P<item>[^/]+)")
    def _delete_item(self, call: Call) -> dict:
        collection = self._collection(call, write=True)
        kept = [item for item in collection.items if item["_id"] != call.args["item"]]
        if len(kept) == len(collection.items):
            raise Problem(404, "Collection item not found")
        collection.items, collection.updated = kept, _now()
        return {"success": True}

    def _collection(self, call: Call, write: bool = False) -> Collection:
        collection = self._collections.get(call.args["slug"].rpartition("-")[2])
        if collection is None or (collection.private and collection.owner not in self._namespaces(call.user)):
            raise Problem(404, "Collection not found")
        if write:
            self._writer(call, collection.owner, "You don't have the rights to change this collection")
        return collection


class _HTTPServer(ThreadingHTTPServer):
    """The listening socket, and the open connections so that stopping the server really hangs up on clients."""

    hub: HubServer
    request_queue_size = 64

    def __init__(self, *args: Any) -> None:
        self.connections: set[socket.socket] = set()
        super().__init__(*args)

    def close_connections(self) -> None:
        for connection in list(self.connections):
            with contextlib.suppress(OSError):  # already gone
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that hung up, which tests cause on purpose."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _HTTPHandler(BaseHTTPRequestHandler):
    """Reads requests off a connection and writes the answers, failing where a test asked for it."""

    server: _HTTPServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise each answer waits 40 ms for the client's acknowledgement

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def _serve(self) -> None:
        hub, path, length = self.server.hub, urlsplit(self.path).path, int(self.headers.get("Content-Length") or 0)
        fault = hub.take_fault(self.command, path)
        if fault and fault.drop and length:
            self.rfile.read(length // 2)
            return self._hang_up()
        body = self.rfile.read(length)
        if len(body) < length:
            return self._hang_up()  # the client gave up in the middle of an upload
        if fault and not (fault.drop or fault.lose_reply):
            reply = Problem(fault.status, _INTERNAL_ERROR).reply
        else:
            try:
                reply = hub.answer(self.command, self.path, self.headers, body)
            except Exception as error:  # a malformed request, and not a 5xx, which the client would send again
                reply = Problem(400, f"The test hub cannot make sense of this: {error!r}").reply
        if fault and (fault.lose_reply or (fault.drop and self.command == "HEAD")):
            return self._hang_up()
        cut = len(reply.body) // 2 if fault and fault.drop else None
        hub.log(self.command, path, reply.status if cut is None else None)  # before the client can look at the log
        self.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
            self.send_header(name, value)
        self.send_header("X-Request-Id", secrets.token_hex(8))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body[:cut])
        if cut is not None:
            self._close()

    def _hang_up(self) -> None:
        self.server.hub.log(self.command, urlsplit(self.path).path, None)
        self._close()

    def _close(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: object) -> None:
        """Keep the test output clean; ``HubServer.requests`` is the log."""

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _serve


# Model cards


def card_metadata(text: str) -> dict[str, Any] | None:
    """The YAML block at the top of a README.md, or None if there is none. A broken one is a ValueError."""
    block = _CARD_YAML.match(text)
    if block is None:
        return None
    try:
        metadata = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        raise ValueError(f"Invalid YAML: {error}") from None
    if metadata is not None and not isinstance(metadata, dict):
        raise ValueError("The metadata must be a YAML mapping")
    return metadata


def check_card(text: str) -> tuple[list[str], list[str]]:
    """The errors and warnings for a README.md: the main checks of the Hub, though not its lists of known values."""
    try:
        card = card_metadata(text)
    except ValueError as error:
        return [str(error)], []
    if not card:
        return [], ["empty or missing yaml metadata in repo card"]
    errors = []
    for key in ("license", "language", "tags", "datasets", "base_model", "metrics"):
        values = card.get(key) if isinstance(card.get(key), list) else [card.get(key)]
        if not all(isinstance(value, str | None) for value in values):
            errors.append(f'"{key}" must be a string or an array of strings')
    for key in ("library_name", "pipeline_tag"):
        if not isinstance(card.get(key), str | None):
            errors.append(f'"{key}" must be a string')
    return errors, []


def _tags(card: dict[str, Any]) -> Iterator[str]:
    """The tags the Hub derives from a card."""
    if isinstance(card.get("library_name"), str):
        yield card["library_name"]
    for key, prefix in (("tags", ""), ("language", ""), ("datasets", "dataset:"), ("base_model", "base_model:")):
        for value in card[key] if isinstance(card.get(key), list) else [card.get(key)]:
            if value:
                yield f"{prefix}{value}"
    if isinstance(card.get("license"), str):
        yield f"license:{card['license']}"


# Files and git


def _apply(files: dict[str, Blob], repo: Repo, key: str, value: dict[str, Any]) -> None:
    """Make one change of a commit."""
    path = str(value.get("path", ""))
    parts = path.rstrip("/").split("/")
    if not path or {"", ".", "..", ".git"} & set(parts):
        raise Problem(400, f"Invalid path: {path!r}")
    if key == "file":
        data = base64.b64decode(value["content"], validate=True)
        if len(data) > REGULAR_FILE_LIMIT:
            raise Problem(400, f"Your push was rejected because it contains files larger than 10 MiB: {path}")
        files[path] = Blob(data)
    elif key == "lfsFile":
        stored = repo.lfs.get(str(value.get("oid")))
        if stored is None or value.get("size", len(stored)) != len(stored):
            why = "Your push was rejected because an LFS pointer pointed to a file that does not exist."
            raise Problem(400, f"{why} Offending file: {path}")
        files[path] = Blob(stored, lfs=True)
    elif key in ("deletedFile", "deletedFolder"):
        gone = [path] if key == "deletedFile" else [file for file in files if file.startswith(path.rstrip("/") + "/")]
        if not gone or not set(gone) <= files.keys():
            kind = "file" if key == "deletedFile" else "folder"
            raise Problem(404, f"A {kind} with this name doesn't exist: {path}", "EntryNotFound")
        for file in gone:
            del files[file]
    else:
        raise Problem(501, f"The test hub does not cover the commit operation {key}")


def _entry(repo: Repo, commit: Commit, path: str, expand: bool) -> dict[str, Any]:
    """A file or folder as the tree listing shows it."""
    entry: dict[str, Any] = {"type": "directory", "path": path, "oid": commit.ids[path], "size": 0}
    if blob := commit.files.get(path):
        entry |= {"type": "file", "size": len(blob.data)}
        if blob.lfs:
            entry["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
    return entry | ({"lastCommit": repo.last_change(commit, path).summary()} if expand else {})


def _folders(paths: Iterable[str]) -> set[str]:
    """Every folder above some files, the root ``""`` included."""
    above = {"" if parent == "." else parent for path in paths for parent in map(str, PurePosixPath(path).parents)}
    return above | {""}


def _git_oid(kind: str, data: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(data)}\0".encode() + data).hexdigest()


def _text(commit: Commit, path: str) -> str:
    return commit.files[path].data.decode("utf-8", "replace") if path in commit.files else ""


def _matches(path: str, rules: Iterable[str]) -> bool:
    """Whether a path matches one of some git-style patterns, of which ``!`` is not covered."""
    parts = path.split("/")
    prefixes = ["/".join(parts[: length + 1]) for length in range(len(parts))]
    return any(fnmatch(name, rule.strip("/")) for rule in rules for name in [*parts, *prefixes])


def _now() -> datetime:
    return datetime.now(UTC)


def _timestamp(date: datetime) -> str:
    return date.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def json_reply(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Reply:
    """An answer with a JSON body. Dates, which YAML metadata may hold, become text."""
    body = json.dumps(value, default=str).encode()
    return Reply(status, body, {"Content-Type": "application/json; charset=utf-8", **(headers or {})})
