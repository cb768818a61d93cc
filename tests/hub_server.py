"""A small Hugging Face hub on 127.0.0.1 for the real client: what it serves, how it misbehaves.

Model info, tree, auth-check, whoami, resolve with ETag, X-Linked-*, a redirect to a "CDN" with
ranges; gates, tokens, renames; slow, cut and failing answers. All of it is set on `Hub`.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

CHUNKS = 40
LARGE = 10_000  # bytes from which a body counts as weights: they are slow, cut, or waited for
NOT_ASKED = "Access to model {} is restricted and you are not in the authorized list."
PENDING = "Your request to access model {} is awaiting a review from the repo authors."
REJECTED = "Your request to access model {} has been rejected by the repo's authors."
SCOPE = "Please enable access to public gated repositories in your fine-grained token settings."
BAD_TOKEN = "Invalid credentials in Authorization header"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repo:
    """`gated` is False, "auto" or "manual"; `refusal` is what the gate says to a known token."""

    files: dict[str, bytes]
    commit: str = "c" * 40
    gated: str | bool = False
    refusal: str = ""
    moved_to: str = ""

    def is_lfs(self, name: str) -> bool:
        return name.endswith((".safetensors", ".gguf"))

    def tree(self) -> list[dict[str, object]]:
        entries: list[dict[str, object]] = []
        for name, data in self.files.items():
            entry: dict[str, object] = {"type": "file", "path": name, "size": len(data)}
            entry["oid"] = git_oid(data)
            if self.is_lfs(name):
                entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 132}
            entries.append(entry)
        return entries

    def siblings(self) -> list[dict[str, object]]:
        entries: list[dict[str, object]] = []
        for name, data in self.files.items():
            entry: dict[str, object] = {"rfilename": name, "size": len(data)}
            entry["blobId"] = git_oid(data)
            if self.is_lfs(name):
                entry["lfs"] = {"sha256": sha256(data), "size": len(data), "pointerSize": 132}
            entries.append(entry)
        return entries


@dataclass
class Hub:
    """The server's state. `seconds` stretches each large body but those of the files `fast`, and
    each stops for `pauses` seconds in its midst; `cuts` large bodies end halfway;
    `failures` maps a pattern of paths to statuses that the next matching requests get.
    `lies` are bytes sent instead of the true ones. `leaked`: the token went to the CDN.
    `sent` counts bytes of weights.
    """

    repos: dict[str, Repo]
    tokens: dict[str, str] = field(default_factory=lambda: {"hf_secret": "ada"})
    url: str = ""
    seconds: float = 0.0
    fast: set[str] = field(default_factory=set)
    pauses: float = 0.0
    sent: int = 0
    cuts: int = 0
    ranges: bool = True
    failures: dict[str, list[int]] = field(default_factory=dict)
    retry_after: str = ""
    lies: dict[str, bytes] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    leaked: bool = False

    @property
    def cdn(self) -> str:
        """Another host name, so that the client takes it for a stranger."""
        return f"{self.url.replace('127.0.0.1', 'localhost')}/cdn"

    def bodies(self, name: str = "") -> int:
        """How often weights, or those of one file, were asked for."""
        return sum(line.startswith("GET /cdn/") and line.endswith(name) for line in self.log)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        return

    def _answer(self) -> None:
        path = unquote(self.path.split("?")[0])
        self.hub.log.append(f"{self.command} {path}")
        for pattern, statuses in self.hub.failures.items():
            if statuses and fnmatch(path, pattern):
                after = {"Retry-After": self.hub.retry_after} if self.hub.retry_after else {}
                return self._send(statuses.pop(0), after)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            return self._refuse(401, "", BAD_TOKEN)
        if path == "/api/whoami-v2":
            user = self.hub.tokens.get(token, "")
            return self._json({"type": "user", "name": user}) if user else self._refuse(401)
        if path.startswith("/cdn/"):
            return self._weights(*path.removeprefix("/cdn/").split(":"))
        api = path.startswith("/api/models/")
        parts = path.removeprefix("/api/models" if api else "").strip("/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        repo = self.hub.repos.get(name)
        if repo is None:
            return self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        if repo.moved_to:
            return self._send(307, {"Location": self.path.replace(name, repo.moved_to, 1)})
        if len(rest) > 1 and rest[1] not in (repo.commit, "main"):
            return self._refuse(404, "RevisionNotFound", "Invalid rev id")
        if rest[:1] in (["auth-check"], ["resolve"]) and repo.gated and not self._may(repo, token):
            if not token:
                text = f"Access to model {name} is restricted. Please log in."
                return self._refuse(401, "GatedRepo", text)
            code = "" if repo.refusal == SCOPE else "GatedRepo"
            return self._refuse(403, code, repo.refusal.format(name))
        if rest[:1] == ["tree"]:
            return self._json(repo.tree())
        if rest[:1] == ["auth-check"]:
            return self._json({})
        if rest[:1] == ["resolve"]:
            return self._resolve(name, repo, "/".join(rest[2:]))
        info = {"id": name, "sha": repo.commit, "gated": repo.gated, "private": False}
        return self._json({**info, "tags": [], "siblings": repo.siblings()})

    def _may(self, repo: Repo, token: str) -> bool:
        return bool(token) and not repo.refusal

    def _resolve(self, name: str, repo: Repo, file: str) -> None:
        data = repo.files.get(file)
        if data is None:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        about = {"X-Repo-Commit": repo.commit}
        if not repo.is_lfs(file):
            return self._send(200, {**about, "ETag": f'"{git_oid(data)}"'}, data)
        linked = {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{sha256(data)}"'}
        return self._send(302, {**about, **linked, "Location": f"{self.hub.cdn}/{name}:{file}"})

    def _weights(self, name: str, file: str) -> None:
        self.hub.leaked |= "Authorization" in self.headers
        data = self.hub.lies.get(file) or self.hub.repos[name].files[file]
        start = 0
        asked = self.headers.get("Range")
        headers = {"ETag": f'"{sha256(data)}"', "Accept-Ranges": "bytes"}
        if asked and self.hub.ranges:
            start = int(asked.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._send(206 if start else 200, headers, data[start:])

    def _json(self, body: object) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(body).encode())

    def _refuse(self, status: int, code: str = "", text: str = "") -> None:
        headers = {"X-Error-Code": code} if code else {}
        if text:
            headers["X-Error-Message"] = text
        self._send(status, headers)

    def _send(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        try:
            if len(body) < LARGE:
                self.wfile.write(body)
            else:
                self._slowly(body)
        except ConnectionError:
            self.close_connection = True  # the client was killed, as some tests want

    def _slowly(self, body: bytes) -> None:
        step = len(body) // CHUNKS + 1
        cut = self.hub.cuts > 0
        self.hub.cuts -= cut
        hurry = self.path.rpartition(":")[2] in self.hub.fast
        for number, start in enumerate(range(0, len(body) // 2 if cut else len(body), step)):
            self.wfile.write(body[start : start + step])
            self.hub.sent += step
            if number == CHUNKS // 2:
                time.sleep(self.hub.pauses)
            time.sleep(0 if hurry else self.hub.seconds / CHUNKS)
        if cut:
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serve `hub` from threads while the context lasts; sets its `url`."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    http.daemon_threads = True
    hub.url = f"http://127.0.0.1:{http.server_port}"
    threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield hub
    finally:
        http.shutdown()
        http.server_close()
