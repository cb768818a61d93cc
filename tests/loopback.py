"""A tiny pair with a build from a package index on 127.0.0.1 and one from a hub (hub_server.py)."""

from __future__ import annotations

import hashlib
import json
import random
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType

from dflash_chat.pairs import Build, Drafter, HubSource, Pair, PyPISource

PAYLOAD = random.Random(0).randbytes(300_000)
COMMIT = "c" * 40
CHUNKS = 40


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_wheel(folder: Path, payload: bytes = PAYLOAD, member: str = "tiny_pair/tiny.gguf") -> Path:
    """A valid wheel, tiny-pair 1.0, with `payload` inside. Same bytes for the same arguments."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / "tiny_pair-1.0-py3-none-any.whl"
    info = "tiny_pair-1.0.dist-info"
    files = {
        "tiny_pair/__init__.py": b"raise RuntimeError('nobody may import this')\n",
        member: payload,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-pair\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data)
        archive.writestr(zipfile.ZipInfo(f"{info}/RECORD"), "".join(f"{n},,\n" for n in files))
    return wheel


def tiny_pair(wheel: Path) -> Pair:
    """The pair whose first build is `wheel` and whose second lies on the loopback hub."""
    data = wheel.read_bytes()
    return Pair(
        name="tiny",
        title="Tiny",
        licence="MIT",
        architecture="llama",
        builds=(
            Build("q4_1", "q4_1", "gguf", wheel_source(data), len(PAYLOAD), 5),
            Build("bf16", "bf16", "safetensors", hub_source(), len(PAYLOAD), 16),
        ),
        default=("q4_1", "bf16"),
        drafter=Drafter(path=Path("/drafter"), block_size=8, draft_tokens=7),
    )


def wheel_source(data: bytes) -> PyPISource:
    """The wheel with these bytes."""
    return PyPISource(
        package="tiny-pair",
        version="1.0",
        wheel_bytes=len(data),
        wheel_sha256=sha256(data),
        member="tiny_pair/tiny.gguf",
        bytes=len(PAYLOAD),
        sha256=sha256(PAYLOAD),
    )


def hub_source() -> HubSource:
    """The loopback hub's repository."""
    return HubSource(
        repo="me/tiny",
        revision=COMMIT,
        bytes=len(PAYLOAD),
        patterns=("*.json", "*.safetensors"),
        sha256={"model.safetensors": sha256(PAYLOAD)},
    )


def as_toml(pair: Pair) -> str:
    """The pair as an entry of models.toml."""

    def keys(item: object, names: tuple[str, ...]) -> list[str]:
        return [f"{name} = {json.dumps(getattr(item, name))}" for name in names]

    lines = ["[[pair]]", *keys(pair, ("name", "title", "licence", "architecture"))]
    lines += keys(pair, ("default",))
    for build in pair.builds:
        source = build.source
        names = tuple(name for name in vars(source) if name != "sha256")
        lines += ["[[pair.build]]", *keys(build, ("name", "weights", "format", "bits"))]
        lines += keys(source, names)
        if isinstance(source, PyPISource):
            lines += keys(source, ("sha256",))
        elif isinstance(source, HubSource):
            lines.append("[pair.build.sha256]")
            lines += [f"{json.dumps(k)} = {json.dumps(v)}" for k, v in source.sha256.items()]
    lines += ["[pair.drafter]", 'kind = "folder"', 'path = "/drafter"', "block_size = 8"]
    return "\n".join(lines) + "\n"


@dataclass
class Server:
    """What was asked for, and how to behave. `seconds` stretches each large body."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    seconds: float = 0.0
    started: threading.Event = field(default_factory=threading.Event)
    bodies: int = 0


@contextmanager
def index(wheel: Path, seconds: float = 0.0) -> Iterator[Server]:
    """A package index with one wheel, sent slowly."""
    page = f'<a href="/files/{wheel.name}">{wheel.name}</a>'.encode()
    files = {"/simple/tiny-pair/": page, f"/files/{wheel.name}": wheel.read_bytes()}
    with _Running(Server(files=files, seconds=seconds)) as server:
        yield server


class _Running:
    """Serves `server.files` from a thread while the context lasts."""

    def __init__(self, server: Server) -> None:
        self.server = server

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self._answer(with_body=False)

            def do_GET(self) -> None:
                self._answer(with_body=True)

            def _answer(self, with_body: bool) -> None:
                body = server.files.get(self.path.split("?")[0])
                if body is None:
                    self.send_response(404)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if with_body:
                    self._send(body)

            def _send(self, body: bytes) -> None:
                if len(body) < 10_000:
                    self.wfile.write(body)
                    return
                server.bodies += 1
                step = len(body) // CHUNKS + 1
                try:
                    for start in range(0, len(body), step):
                        self.wfile.write(body[start : start + step])
                        if start > 2 * step:
                            server.started.set()
                        time.sleep(server.seconds / CHUNKS)
                except ConnectionError:
                    return  # the client was killed, as some tests want

            def log_message(self, *_: object) -> None:
                return

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        server.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self) -> Server:
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()
        return self.server

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.http.shutdown()
        self.http.server_close()
