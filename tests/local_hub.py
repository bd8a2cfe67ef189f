"""A Hub on this machine: the requests of huggingface_hub, datasets and Diffusers, answered from a folder."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse


COMMIT = "1" * 40
API = re.compile(r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)(/revision/[^/]+|/tree/[^/]+(?P<folder>/.*)?)?")
FILE = re.compile(r"/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)/resolve/[^/]+/(?P<file>.+)")


@contextmanager
def serve(root: Path) -> Iterator[dict[str, str]]:
    """Serves `root`/models/OWNER/NAME and `root`/datasets/OWNER/NAME; gives the environment of its clients."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, root))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(root / "cache"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
        }
    finally:
        server.shutdown()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    def __init__(self, root: Path, *arguments):
        self.root = root
        super().__init__(*arguments)

    def do_GET(self):
        url = urlparse(self.path)
        path = unquote(url.path)
        if place := FILE.fullmatch(path):
            self.send_file(self.root / (place["kind"] or "models") / place["name"] / place["file"])
        elif (place := API.fullmatch(path)) and (repository := self.root / place["kind"] / place["name"]).is_dir():
            if "/tree/" in path:
                recursive = parse_qs(url.query).get("recursive") == ["true"]
                self.send_tree(repository, repository / (place["folder"] or "/")[1:], recursive)
            else:
                files = [{"rfilename": str(file.relative_to(repository))} for file in repository.rglob("*.*")]
                self.send_json({"id": place["name"], "sha": COMMIT, "private": False, "tags": [], "siblings": files})
        else:
            self.send_missing("RepoNotFound")

    do_HEAD = do_GET

    def send_tree(self, repository: Path, folder: Path, recursive: bool) -> None:
        entries = [
            {
                "type": "file" if path.is_file() else "directory",
                "path": str(path.relative_to(repository)),
                "size": path.stat().st_size,
                "oid": COMMIT,
            }
            for path in sorted(folder.glob("**/*" if recursive else "*"))
        ]
        self.send_json(entries)

    def send_file(self, file: Path) -> None:
        if not file.is_file():
            return self.send_missing("EntryNotFound")
        content = file.read_bytes()
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        headers = {"ETag": f'"{file.relative_to(self.root)}"', "X-Repo-Commit": COMMIT}
        if span:
            first, last = int(span[1]), min(int(span[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content = content[first : last + 1]
        self.send(206 if span else 200, content, headers)

    def send_json(self, answer: object) -> None:
        self.send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def send_missing(self, code: str) -> None:
        self.send(404, b"{}", {"Content-Type": "application/json", "X-Error-Code": code})

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *arguments):
        """Nothing: pytest shows what matters."""
