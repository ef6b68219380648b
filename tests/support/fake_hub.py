"""The part of the Hugging Face Hub's HTTP interface that downloads and uploads use, over a folder:
ROOT/models/owner/name/files and ROOT/datasets/owner/name/files. `python fake_hub.py ROOT` prints its address."""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

from quiet_server import QuietServer

COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    root = Path()
    drop_after: int | None = None
    """Bytes of a file after which the connection is dropped, once."""
    asked: list[str] = []  # noqa: RUF012
    objects: dict[str, bytes] = {}  # noqa: RUF012

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_POST(self) -> None:
        """Uploads: a repository is made, weights go ahead by their hash, a commit brings them and the other files."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        parts = [unquote(part) for part in urlparse(self.path).path.strip("/").split("/")]
        if "Authorization" not in self.headers:
            return self.error("Unauthorized", 401)
        if parts == ["api", "validate-yaml"]:
            return self.json({"errors": [], "warnings": []})
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            folder = self.folder("models", f"{asked['organization']}/{asked['name']}")
            folder.mkdir(parents=True, exist_ok=True)
            Hub.asked.append(f"private={asked.get('private')}")
            return self.json({"url": f"{self.address}/{asked['organization']}/{asked['name']}"})
        if parts[-2:] == ["objects", "batch"]:
            objects = json.loads(body)["objects"]
            return self.json({"transfer": "basic", "objects": [
                {**one, "actions": {"upload": {"href": f"{self.address}/lfs/{one['oid']}"}}} for one in objects
            ]})  # fmt: skip
        repo, action = "/".join(parts[2:4]), parts[4]
        if action == "preupload":
            return self.json({"files": [
                {"path": one["path"], "shouldIgnore": False, "uploadMode": "regular" if one["size"] < 50_000 else "lfs"}
                for one in json.loads(body)["files"]
            ]})  # fmt: skip
        self.commit(self.folder("models", repo), [json.loads(line) for line in body.splitlines()])
        return self.json({"commitUrl": f"{self.address}/{repo}/commit/{COMMIT}", "commitOid": COMMIT})

    def do_PUT(self) -> None:
        Hub.objects[self.path.rpartition("/")[2]] = self.rfile.read(int(self.headers["Content-Length"]))
        self.json({})

    @property
    def address(self) -> str:
        return f"http://{self.headers['Host']}"

    @staticmethod
    def commit(folder: Path, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                (folder / value["path"]).write_bytes(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                (folder / value["path"]).write_bytes(Hub.objects[value["oid"]])

    def answer(self, body: bool) -> None:
        url = urlparse(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        Hub.asked.append(f"{self.command} {url.path}")
        if parts[0] == "api":
            return self.api(parts[1:], parse_qs(url.query))
        kind = "datasets" if parts[0] == "datasets" else "models"
        parts = parts[1:] if kind == "datasets" else parts
        repo, (_, revision, *path) = "/".join(parts[:2]), parts[2:]
        if not self.known(kind, repo, revision):
            return None
        file = self.folder(kind, repo) / "/".join(path)
        if not file.is_file():
            return self.error("EntryNotFound")
        return self.file(file, body)

    def known(self, kind: str, repo: str, revision: str) -> bool:
        if not self.folder(kind, repo).is_dir():
            self.error("RepoNotFound", 401)
            return False
        if revision not in ("main", COMMIT):
            self.error("RevisionNotFound")
            return False
        return True

    def folder(self, kind: str, repo: str) -> Path:
        return self.root / kind / repo

    def api(self, parts: list[str], query: dict[str, list[str]]) -> None:
        kind, parts = parts[0], parts[1:]
        if kind not in ("models", "datasets"):
            return self.error("EntryNotFound")
        if not parts:
            wanted = (query.get("search") or query.get("author") or [""])[0].lower()
            names = [str(path.relative_to(self.root / kind)) for path in sorted((self.root / kind).glob("*/*"))]
            return self.json([{"id": name, "modelId": name} for name in names if wanted in name.lower()])
        repo, rest = "/".join(parts[:2]), parts[2:]
        revision = "/".join(rest[1:2]) if rest else "main"
        if not self.known(kind, repo, revision):
            return None
        folder = self.folder(kind, repo)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [str(path.relative_to(folder)) for path in files]
        if rest and rest[0] == "tree":
            return self.json(
                [
                    {"type": "file", "path": name, "size": path.stat().st_size, "oid": self.etag(path)}
                    for name, path in zip(names, files, strict=True)
                ]
            )
        siblings = [{"rfilename": name} for name in names]
        return self.json(
            {
                "id": repo,
                "sha": COMMIT,
                "private": False,
                "gated": False,
                "disabled": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": siblings,
            }
        )

    @staticmethod
    def etag(file: Path) -> str:
        return hashlib.sha1(file.read_bytes()).hexdigest()

    def file(self, file: Path, body: bool) -> None:
        content, first = file.read_bytes(), 0
        asked = self.headers.get("Range", "")
        if asked.startswith("bytes="):
            first = int(asked.removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if first else 200)
        self.send_header("ETag", f'"{self.etag(file)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        if not body:
            return
        if Hub.drop_after is not None and len(content) > Hub.drop_after:
            self.wfile.write(content[first : Hub.drop_after])
            Hub.drop_after = None
            self.close_connection = True
            return
        self.wfile.write(content[first:])

    def error(self, code: str, status: int = 404) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def json(self, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def serve(root: Path) -> QuietServer:
    Hub.root = root
    return QuietServer(("127.0.0.1", 0), Hub)


if __name__ == "__main__":
    server = serve(Path(sys.argv[1]))
    if len(sys.argv) > 2:
        Hub.drop_after = int(sys.argv[2])
    print(f"http://127.0.0.1:{server.server_port}", flush=True)  # noqa: T201
    server.serve_forever()
