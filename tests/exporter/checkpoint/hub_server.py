"""A server on the loopback that speaks as much of the hub's protocol as fetching a model needs, and misbehaves."""

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the server has, what it does wrong, and what was asked of it.

    Attributes:
        models: directories by id.
        gated: ids that are gated.
        broken: how many bytes of a body are sent before the connection breaks off, once for each file name.
        spoilt: names of files whose content is not what the listing says.
        refuses: status that every request gets; 0 for none.
        requests: method, path and `Range` of each request.
        endpoint: its address.
    """

    models: dict[str, Path]
    gated: set[str] = field(default_factory=set)
    broken: dict[str, int] = field(default_factory=dict)
    spoilt: set[str] = field(default_factory=set)
    refuses: int = 0
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    endpoint: str = ""

    def fetched(self) -> list[str]:
        """Names of the files whose content was asked for."""
        return [path.rpartition("/")[2] for method, path, _ in self.requests if method == "GET" and "/resolve/" in path]


def serve(hub: Hub) -> ThreadingHTTPServer:
    """Start a server in a thread; its `shutdown` ends it."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Print nothing."""

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path, self.headers.get("Range")))
            match = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+)/(?:(revision|tree|resolve)/)?([^/]+)/?(.*)", path)
            if hub.refuses or match is None:
                return self.answer(hub.refuses or 404, b"{}")
            name, kind, revision, file = match.groups()
            directory = hub.models.get(name)
            if directory is None:
                return self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "not found"})
            if revision not in ("main", COMMIT, "v1"):
                return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "no revision"})
            files = sorted(path for path in directory.rglob("*") if path.is_file())
            if kind == "revision":
                siblings = [{"rfilename": str(path.relative_to(directory))} for path in files]
                return self.answer(200, json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode())
            if name in hub.gated:
                return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
            if kind == "tree":
                return self.answer(200, json.dumps([listed(path, directory) for path in files]).encode())
            content = (directory / file).read_bytes()
            headers = {"ETag": f'"{digest(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            if file in hub.spoilt:
                content = content[:-1] + bytes([content[-1] ^ 1])
            start = int(re.findall(r"\d+", self.headers.get("Range", "0"))[0])
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            cut = hub.broken.pop(file, None) if self.command == "GET" else None
            return self.answer(206 if start else 200, content[start:], headers, cut)

        def answer(self, status: int, body: bytes, headers: Mapping[str, str] = {}, cut: int | None = None) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[:cut])
            if cut is not None:
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server


def digest(content: bytes) -> str:
    """What the hub takes as a file's ETag if it is stored apart, as weights are."""
    return hashlib.sha256(content).hexdigest()


def listed(path: Path, directory: Path) -> dict[str, object]:
    """An entry of the listing of a model's files."""
    content = path.read_bytes()
    lfs = {"lfs": {"oid": digest(content), "size": len(content), "pointerSize": 134}}
    return {
        "type": "file",
        "path": str(path.relative_to(directory)),
        "size": len(content),
        "oid": digest(content)[:40],
        **(lfs if path.suffix == ".safetensors" else {}),
    }
