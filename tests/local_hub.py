"""A Hub on this machine: requests of huggingface_hub, datasets and Diffusers, answered from a folder and into it."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse


API = re.compile(
    r"/api/(?P<kind>models|datasets|spaces)/(?P<name>[^/]+/[^/]+)"
    r"(/(?P<action>revision|tree|preupload|commit)/(?P<revision>[^/]+)(?P<folder>/.*)?)?"
)
FILE = re.compile(r"/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
LOG = "requests.jsonl"
USER = "me"


@contextmanager
def serve(root: Path, cut: set[str] = frozenset()) -> Iterator[dict[str, str]]:
    """
    Serves `root`/models/OWNER/NAME and `root`/datasets/OWNER/NAME, revision v1 of them from OWNER/NAME@v1; uploads
    arrive there and in `root`/spaces, those of the token "secret". `requests` tells what was asked for.

    Args:
        root: the folder.
        cut: names of files whose first download breaks off half-way.

    Returns:
        The environment of its clients.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, root, cut))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(root / "cache"),
            "HF_TOKEN": "secret",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
        }
    finally:
        server.shutdown()
        server.server_close()


def requests(root: Path) -> list[dict[str, str | None]]:
    """All requests so far: `method`, `path` and `range`."""
    file = root / LOG
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def downloads(root: Path) -> list[str]:
    """Names of the files whose content was sent."""
    found = (FILE.fullmatch(request["path"]) for request in requests(root) if request["method"] == "GET")
    return [place["file"] for place in found if place]


class Handler(BaseHTTPRequestHandler):
    lock = threading.Lock()

    def __init__(self, root: Path, cut: set[str], *arguments):
        self.root, self.cut = root, cut
        super().__init__(*arguments)

    def do_GET(self):
        self.note()
        if self.headers.get("Authorization") not in (None, "Bearer secret"):
            return self.send_refusal()
        url = urlparse(self.path)
        path = unquote(url.path)
        if place := FILE.fullmatch(path):
            repository = self.repository(place["kind"] or "models", place["name"], place["revision"])
            if repository is not None:
                self.send_file(repository, place["file"])
        elif (place := API.fullmatch(path)) and place["action"] in (None, "revision", "tree"):
            repository = self.repository(place["kind"], place["name"], place["revision"])
            if repository is not None and place["action"] == "tree":
                recursive = parse_qs(url.query).get("recursive") == ["true"]
                self.send_tree(repository, repository / (place["folder"] or "/")[1:], recursive)
            elif repository is not None:
                files = [{"rfilename": str(file.relative_to(repository))} for file in repository.rglob("*.*")]
                facts = {"id": place["name"], "sha": commit_of(repository), "private": False, "tags": []}
                self.send_json({**facts, "siblings": files})
        else:
            self.send_missing("RepoNotFound")

    do_HEAD = do_GET

    def do_POST(self):
        self.note()
        content = self.rfile.read(int(self.headers["Content-Length"]))
        path = unquote(urlparse(self.path).path)
        if self.headers.get("Authorization") != "Bearer secret":
            self.send_refusal()
        elif path == "/api/repos/create":
            given = json.loads(content)
            name = f"{given.get('organization') or USER}/{given['name']}"
            (self.root / f"{given.get('type') or 'model'}s" / name).mkdir(parents=True, exist_ok=True)
            self.send_json({"url": f"http://{self.headers['Host']}/{name}", "name": name})
        elif path == "/api/validate-yaml":
            self.send_json({"errors": [], "warnings": []})
        elif (place := API.fullmatch(path)) and place["action"] == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(content)["files"]
            ]
            self.send_json({"files": files})
        elif place and place["action"] == "commit":
            repository = self.root / place["kind"] / place["name"]
            for line in map(json.loads, content.splitlines()):
                if line["key"] == "file":
                    file = repository / line["value"]["path"]
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(base64.b64decode(line["value"]["content"]))
            url = f"http://{self.headers['Host']}/{place['name']}/commit/{commit_of(repository)}"
            self.send_json({"commitUrl": url, "commitOid": commit_of(repository), "pullRequestUrl": None})
        else:
            self.send_missing("RepoNotFound")

    def note(self) -> None:
        entry = {"method": self.command, "path": unquote(self.path), "range": self.headers.get("Range")}
        with self.lock, (self.root / LOG).open("a") as log:
            log.write(json.dumps(entry) + "\n")

    def repository(self, kind: str, name: str, revision: str | None) -> Path | None:
        """The folder of a revision, by its name or commit; where there is none, the client is told."""
        main = self.root / kind.strip("/") / name
        if not main.is_dir():
            return self.send_missing("RepoNotFound")
        for folder in (main, *main.parent.glob(f"{main.name}@*")):
            if revision in (folder.name.partition("@")[2] or "main", commit_of(folder), None):
                return folder
        return self.send_missing("RevisionNotFound")

    def send_tree(self, repository: Path, folder: Path, recursive: bool) -> None:
        entries = [
            {
                "type": "file" if path.is_file() else "directory",
                "path": str(path.relative_to(repository)),
                "size": path.stat().st_size,
                "oid": "1" * 40,
            }
            for path in sorted(folder.glob("**/*" if recursive else "*"))
        ]
        self.send_json(entries)

    def send_file(self, repository: Path, name: str) -> None:
        file = repository / name
        if not file.is_file():
            return self.send_missing("EntryNotFound")
        content = file.read_bytes()
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit_of(repository)}
        if span:
            first, last = int(span[1]), min(int(span[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content = content[first : last + 1]
        if self.command == "GET" and name in self.cut:
            self.cut.remove(name)
            self.close_connection = True
            return self.send(200, content, headers, sent=len(content) // 2)
        self.send(206 if span else 200, content, headers)

    def send_json(self, answer: object) -> None:
        self.send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def send_refusal(self) -> None:
        self.send(401, b'{"error": "Invalid user token."}', {"Content-Type": "application/json"})

    def send_missing(self, code: str) -> None:
        self.send(404, b"{}", {"Content-Type": "application/json", "X-Error-Code": code})

    def send(self, status: int, content: bytes, headers: dict[str, str], sent: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:sent])

    def log_message(self, *arguments):
        """Nothing: pytest shows what matters."""


def commit_of(repository: Path) -> str:
    """Changes with the content."""
    digest = hashlib.sha1(str(repository).encode())
    for file in sorted(path for path in repository.rglob("*") if path.is_file()):
        digest.update(f"{file.relative_to(repository)}".encode() + file.read_bytes())
    return digest.hexdigest()
