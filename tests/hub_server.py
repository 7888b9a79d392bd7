"""A Hub on this machine that serves folders for download: what `from_pretrained` asks of it, and no more."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0" * 40


class _Handler(BaseHTTPRequestHandler):
    root: Path

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self.describe("/".join(parts[2:4]), tree="tree" in parts)
        name, file = "/".join(parts[:2]), self.root / "/".join(parts[:2]) / "/".join(parts[4:])
        if parts[2:3] != ["resolve"] or not file.is_file():
            missing = "EntryNotFound" if (self.root / name).is_dir() else "RepoNotFound"
            return self.reply(404, b"", {"X-Error-Code": missing, "X-Repo-Commit": COMMIT})
        content = file.read_bytes()
        etag = hashlib.sha256(content).hexdigest()
        self.reply(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, with_body)

    def describe(self, name, tree):
        folder = self.root / name
        if not folder.is_dir():
            return self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        files = [f for f in folder.rglob("*") if f.is_file()]
        paths = [f.relative_to(folder).as_posix() for f in files]
        if tree:
            rows = [
                {"type": "file", "path": path, "size": file.stat().st_size, "oid": "0" * 40}
                for path, file in zip(paths, files, strict=True)
            ]
            return self.reply(200, json.dumps(rows).encode())
        about = {"id": name, "sha": COMMIT, "private": False, "gated": False, "disabled": False, "tags": []}
        self.reply(200, json.dumps(about | {"siblings": [{"rfilename": path} for path in paths]}).encode())

    def reply(self, status, content, headers=None, with_body=True):
        self.send_response(status)
        for key, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, *args):
        """Quiet."""


class LocalHub:
    """Serves `root/user/name` as the repository `user/name` while the `with` block runs."""

    def __init__(self, root: Path):
        handler = type("Handler", (_Handler,), {"root": root})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()
