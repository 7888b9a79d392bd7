"""A Hub on this machine that speaks the protocol of the real one, as far as the real client goes: repositories with
commits, branches and pull requests, uploads by LFS, downloads by range; and that fails when it is told to."""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_" + "a1B2" * 9
USER = "user"
LICENSES = {
    "apache-2.0",
    "mit",
    "creativeml-openrail-m",
    "openrail++",
    "cc-by-4.0",
    "cc-by-nc-4.0",
    "other",
    "unknown",
}
TASKS = {"text-to-image", "unconditional-image-generation"}


@dataclass
class Repository:
    """Snapshots by commit, and what the branches point to."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, bytes], message: str) -> str:
        digest = hashlib.sha1(f"{len(self.commits)} {message}".encode())
        for path in sorted(files):
            digest.update(path.encode() + files[path])
        oid = digest.hexdigest()
        self.commits[oid], self.refs[ref] = files, oid
        self.messages.append(message)
        return oid

    def files(self, revision: str = "main") -> dict[str, bytes] | None:
        return self.commits.get(self.refs.get(revision, revision))


@dataclass
class Fault:
    """What goes wrong with the next requests that match."""

    method: str
    path: str
    what: int | str  # a status, "drop" in the middle, or "corrupt"
    times: int


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: "LocalHub"

    def do_HEAD(self):
        self.handle_request()

    def do_GET(self):
        self.handle_request()

    def do_POST(self):
        self.handle_request()

    def do_PUT(self):
        self.handle_request()

    def handle_request(self):
        url = urlsplit(self.path)
        self.parts = unquote(url.path).strip("/").split("/")
        self.raw_parts = [unquote(part) for part in url.path.strip("/").split("/")]  # a branch may have a slash
        self.query = parse_qs(url.query)
        self.hub.requests.append((self.command, url.path))
        fault = self.hub.next_fault(self.command, url.path)
        self.corrupt, self.dropping = fault == "corrupt", fault == "drop"
        if self.dropping and self.command in ("PUT", "POST"):
            self.rfile.read(self.length // 2)
            return self.drop()
        self.body = self.rfile.read(self.length)
        if isinstance(fault, int):
            return self.reply(fault, b"{}", {"Retry-After": "0"} if fault == 429 else {})
        with self.hub.lock:
            self.route()

    @property
    def length(self) -> int:
        return int(self.headers.get("Content-Length") or 0)

    def drop(self):
        self.close_connection = True
        self.connection.close()

    @property
    def logged_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def route(self):
        parts = self.raw_parts
        if parts[:2] == ["api", "validate-yaml"]:
            return self.validate(json.loads(self.body)["content"])
        if parts[0] == "storage":
            return self.store(parts[1])
        if self.command in ("POST", "PUT") and not self.logged_in:
            return self.reply(401, b'{"error": "Invalid username or password."}')
        if parts == ["api", "repos", "create"]:
            return self.create(json.loads(self.body))
        if parts[2:] == ["info", "lfs", "objects", "batch"]:
            return self.lfs_batch(json.loads(self.body))
        if parts[0] == "lfs-verify":
            return self.lfs_verify(json.loads(self.body))
        in_api = parts[:2] == ["api", "models"]
        name, rest = ("/".join(parts[2:4]), parts[4:]) if in_api else ("/".join(parts[:2]), parts[2:])
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self.logged_in):
            return self.error(404, "RepoNotFound")
        if in_api and self.command == "POST":
            return {"preupload": self.preupload, "commit": self.commit, "branch": self.branch}[rest[0]](
                name, repository, rest[1]
            )
        revision = rest[1] if len(rest) > 1 else "main"
        if (files := repository.files(revision)) is None:
            return self.error(404, "RevisionNotFound")
        oid = repository.refs.get(revision, revision)
        if not in_api:
            return self.resolve(repository, oid, files, "/".join(rest[2:]))
        if rest[:1] == ["tree"]:
            rows = [
                {"type": "file", "path": path, "size": len(content), "oid": _git_oid(content)}
                | (
                    {"lfs": {"oid": _sha256(content), "size": len(content), "pointerSize": 130}}
                    if _is_lfs(path)
                    else {}
                )
                for path, content in files.items()
            ]
            return self.json(rows)
        self.json(
            {"id": name, "sha": oid, "private": repository.private, "gated": repository.gated, "disabled": False}
            | {"tags": [], "siblings": [{"rfilename": path} for path in files]}
        )

    # making and filling repositories

    def create(self, wanted):
        name = f"{wanted.get('organization') or USER}/{wanted['name']}"
        answer = {"url": f"{self.hub.endpoint}/{name}", "name": name, "id": name}
        if wanted.get("organization") not in (None, USER):
            return self.error(403, "Forbidden")
        if name in self.hub.repositories:
            return self.json(answer | {"error": "You already created this model repo"}, 409)
        private = wanted.get("private") or wanted.get("visibility") == "private"
        repository = self.hub.repositories[name] = Repository(private=bool(private))
        repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        self.json(answer)

    def validate(self, content):
        """What the real server checks of a card, in small."""
        problems = []
        match = re.match(r"---\n(.*?)\n---\n", content, re.S)
        data = yaml.safe_load(match.group(1)) if match else {}
        if data.get("license") not in LICENSES:
            problems.append(f"license {data.get('license')!r}")
        if data.get("license") == "other" and not data.get("license_name"):
            problems.append("license_name is missing")
        if data.get("pipeline_tag") not in TASKS:
            problems.append(f"pipeline_tag {data.get('pipeline_tag')!r}")
        for key in ("base_model", "datasets"):
            values = data.get(key, [])
            for value in [values] if isinstance(values, str) else values:
                if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value):
                    problems.append(f"{key} {value!r}")
        if data.get("base_model_relation", "finetune") not in ("finetune", "adapter", "merge", "quantized"):
            problems.append(f"base_model_relation {data['base_model_relation']!r}")
        if not all(isinstance(tag, str) for tag in data.get("tags", [])):
            problems.append("tags")
        for model in data.get("model-index", []):
            for result in model["results"]:
                if not (model["name"] and result["task"]["type"] in TASKS and result["dataset"]["name"]):
                    problems.append(f"model-index {result}")
                if not all(isinstance(metric["value"], (int, float)) for metric in result["metrics"]):
                    problems.append(f"model-index {result}")
        errors = [{"message": problem} for problem in problems]
        self.json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, name, repository, revision):
        if (files := repository.files(revision)) is None:
            return self.error(404, "RevisionNotFound")
        rows = []
        for file in json.loads(self.body)["files"]:
            path, old = file["path"], files.get(file["path"])
            oid = None if old is None else _sha256(old) if _is_lfs(path) else _git_oid(old)
            mode = "lfs" if _is_lfs(path) else "regular"
            rows.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.json({"files": rows})

    def lfs_batch(self, wanted):
        rows = []
        for row in wanted["objects"]:
            oid, address = row["oid"], self.hub.endpoint
            actions = {"upload": {"href": f"{address}/storage/{oid}"}, "verify": {"href": f"{address}/lfs-verify/x"}}
            rows.append(row if oid in self.hub.objects else row | {"actions": actions})
        self.json({"transfer": "basic", "objects": rows})

    def store(self, oid):
        self.hub.objects[oid] = self.body[:-1] + b"?" if self.corrupt else self.body
        self.reply(200, b"")

    def lfs_verify(self, wanted):
        if _sha256(self.hub.objects.get(wanted["oid"], b"")) != wanted["oid"]:
            self.hub.objects.pop(wanted["oid"], None)
            return self.json({"error": "The hash of the uploaded object is wrong."}, 422)
        self.json({})

    def commit(self, name, repository, revision):
        files = repository.files(revision)
        if files is None:
            return self.error(404, "RevisionNotFound")
        files, message = dict(files), ""
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return self.json({"error": f"no object {value['oid']}"}, 422)
                files[value["path"]] = self.hub.objects[value["oid"]]
            else:
                assert item["key"] == "deletedFile", item
                del files[value["path"]]
        number = sum(ref.startswith("refs/pr/") for ref in repository.refs) + 1
        create_pr = "create_pr" in self.query
        oid = repository.commit(f"refs/pr/{number}" if create_pr else revision, files, message)
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{name}/commit/{oid}"}
        if create_pr:
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{name}/discussions/{number}"
        self.json(answer)

    def branch(self, name, repository, branch):
        if branch.startswith("refs/"):
            return self.json({"error": f"Invalid reference for a branch: {branch}"}, 400)
        if branch in repository.refs:
            return self.json({"error": "Reference already exists"}, 409)
        repository.refs[branch] = repository.refs["main"]
        self.json({})

    # reading

    def resolve(self, repository, oid, files, path):
        if repository.gated and not self.logged_in:
            return self.error(401, "GatedRepo")
        if path not in files:
            return self.error(404, "EntryNotFound", {"X-Repo-Commit": oid})
        content = files[path]
        etag = _sha256(content) if _is_lfs(path) else _git_oid(content)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        status, wanted = 200, re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted:
            first = int(wanted.group(1))
            last = min(int(wanted.group(2) or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            status, content = 206, content[first : last + 1]
        self.reply(status, content, headers)

    # answers

    def json(self, content, status=200):
        self.reply(status, json.dumps(content).encode())

    def error(self, status, code, headers=None):
        self.reply(status, b"{}", {"X-Error-Code": code} | (headers or {}))

    def reply(self, status, content, headers=None):
        self.send_response(status)
        for key, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if self.dropping else content)
        if self.dropping:
            self.drop()

    def log_message(self, *args):
        """Quiet."""


def _is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".bin", ".png"))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """A connection that one side dropped is what some tests are about."""


class LocalHub:
    """A Hub while the `with` block runs; `root/user/name`, if given, is there as the repository `user/name`."""

    def __init__(self, root: Path | None = None):
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        for folder in sorted(Path(root).glob("*/*")) if root else []:
            files = {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
            repository = self.repositories[folder.relative_to(root).as_posix()] = Repository()
            repository.commit("main", files, "initial commit")
        self.server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def fail(self, method: str, path: str, what: int | str, times: int = 1) -> None:
        """Let the next requests with `path`, a regular expression, fail."""
        self.faults.append(Fault(method, path, what, times))

    def next_fault(self, method: str, path: str) -> int | str | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault.what
        return None

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()
