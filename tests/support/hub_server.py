"""A stand-in for a model hub on localhost: the few endpoints that huggingface_hub asks, and a log of what was asked."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """Models by id, each with its revisions by name; change them while it serves."""

    models: dict[str, dict[str, Path]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    log: list[str] = field(default_factory=list)  # "METHOD path"
    url: str = ""

    def add(self, model: str, folder: Path, revision: str = "main") -> str:
        """Serve a folder as a model's revision; return its commit."""
        self.models.setdefault(model, {})[revision] = folder
        return commit(folder)

    def downloaded(self) -> set[str]:
        """Return the names of the files whose content was asked for."""
        asked = [line.split("/resolve/")[1] for line in self.log if line.startswith("GET") and "/resolve/" in line]
        return {line.split("/", 1)[1] for line in asked}


def commit(folder: Path) -> str:
    """Return the commit that a folder is served as."""
    return hashlib.sha1(str(folder).encode()).hexdigest()


def files(folder: Path) -> list[tuple[str, Path]]:
    """Return the names and paths of a model's files."""
    return [(path.relative_to(folder).as_posix(), path) for path in sorted(folder.rglob("*")) if path.is_file()]


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve until the context is left; `hub.url` is what HF_ENDPOINT is to be."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.log.append(f"{self.command} {path}")
            api, _, rest = path.partition("/api/models/")
            name, _, tail = (rest if not api else path[1:]).partition("/")
            second, _, tail = tail.partition("/")
            self.answer(f"{name}/{second}", tail)

        def answer(self, model: str, tail: str) -> None:
            revisions = hub.models.get(model)
            if revisions is None:
                return self.send(401, b"", {"X-Error-Code": "RepoNotFound"})
            verb, _, rest = tail.partition("/")
            commits = {commit(folder): folder for folder in revisions.values()}
            if verb in ("", "revision"):
                return self.describe({**commits, **revisions}.get(rest or "main"), model)
            sha, _, name = rest.partition("/")
            folder = commits[sha]
            if verb == "tree":
                entries = [
                    {"type": "file", "path": n, "size": p.stat().st_size, "oid": etag(p)} for n, p in files(folder)
                ]
                return self.send(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})
            assert verb == "resolve", tail
            if model in hub.gated:
                return self.send(401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
            path = folder / name
            return self.send(200, path.read_bytes(), {"ETag": f'"{etag(path)}"', "X-Repo-Commit": sha})

        def describe(self, folder: Path | None, model: str) -> None:
            if folder is None:
                return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            siblings = [{"rfilename": name, "size": path.stat().st_size} for name, path in files(folder)]
            info = {"id": model, "sha": commit(folder), "siblings": siblings, "tags": [], "private": False}
            headers = {"Content-Type": "application/json", "X-HF-Warning": "unauthenticated; Set a token."}
            return self.send(200, json.dumps(info).encode(), headers)

        def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    with ThreadingHTTPServer(("localhost", 0), Handler) as server:
        hub.url = f"http://localhost:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


def etag(path: Path) -> str:
    """Return a file's identity, as git would: by its content."""
    return hashlib.sha1(path.read_bytes()).hexdigest()
