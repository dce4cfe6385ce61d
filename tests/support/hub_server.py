"""A hub on loopback: the endpoints that huggingface_hub uses, and what may go wrong."""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "org/name"
TOKEN = "hf_thisisasecretthatnobodymaysee"


class Hub:
    """State of the server: the files of one repository, and the faults that it has.

    Parameters
    ----------
    folder
        The checkpoint that it serves as ``org/name``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: list[tuple[str, str]] = []
        self.sent = Counter()
        """Bytes of each file that went out."""
        self.statuses: dict[str, list[int]] = {}
        """Statuses to answer with, before the right one, by a part of the path."""
        self.drop: dict[str, int] = {}
        """Times that a file's connection is to be cut in the middle."""
        self.wrong: dict[str, int] = {}
        """Times that a file is to be sent with another byte."""
        self.needs_token = False
        self.commit = COMMIT
        """What the branch is at."""
        self.headers: dict[str, str] = {}
        """Headers of files that are not as they should be."""
        self.bodies: dict[str, bytes] = {}
        """What is sent in place of a file."""
        self.answer = b""
        """What is sent in place of the description of the repository."""
        self.elsewhere = ""
        """A server that has the files, if this one has not."""
        self.authorized: list[str] = []
        """Paths that were asked for with a token."""
        self.pushed: dict[str, bytes] = {}
        self.url = ""

    def files(self):
        return sorted(p.name for p in self.folder.iterdir() if p.is_file())

    def info(self):
        siblings = []
        for name in self.files():
            data = (self.folder / name).read_bytes()
            sibling = {"rfilename": name, "size": len(data), "blobId": "0" * 40}
            if name.endswith(".safetensors"):
                digest = hashlib.sha256(data).hexdigest()
                sibling["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 130}
            siblings.append(sibling)
        return {
            "id": REPO,
            "modelId": REPO,
            "sha": self.commit,
            "siblings": siblings,
            "tags": [],
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer()

    do_GET = do_POST = do_PUT = do_HEAD

    def _answer(self):
        hub, path = self.hub, self.path.partition("?")[0]
        hub.requests.append((self.command, self.path))
        if "Authorization" in self.headers:
            hub.authorized.append(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        for part, statuses in hub.statuses.items():
            if part in path and statuses:
                return self._send(statuses.pop(0), b"{}")
        if hub.needs_token and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        for pattern, act in _ROUTES:
            if match := re.fullmatch(pattern, path):
                return act(self, match, body)
        return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _info(self, _match, _body):
        self._send(200, self.hub.answer or json.dumps(self.hub.info()).encode())

    def _file(self, match, _body):
        hub, name = self.hub, match["name"]
        path = hub.folder / name
        if not path.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        data = path.read_bytes()
        etag = hashlib.sha256(data).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": hub.commit, "Accept-Ranges": "bytes"}
        headers |= hub.headers
        if hub.elsewhere:
            headers |= {"Location": hub.elsewhere + self.path, "X-Linked-Size": str(len(data))}
            return self._send(302, b"", headers)
        if hub.wrong.get(name) and self.command == "GET":
            hub.wrong[name] -= 1
            data = data[:-1] + bytes([data[-1] ^ 1])
        data = hub.bodies.get(name, data) if self.command == "GET" else data
        status, start, stop = 200, 0, len(data)
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start = int(wanted[1])
            stop = min(len(data), int(wanted[2] or len(data)) + 1)
            status = 206
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        return self._send(status, data[start:stop], headers, name=name)

    def _preupload(self, _match, body):
        files = [
            {"path": each["path"], "shouldIgnore": False,
             "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular"}
            for each in json.loads(body)["files"]
        ]  # fmt: skip
        self._send_json({"files": files})

    def _lfs_batch(self, _match, body):
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}}
            for each in json.loads(body)["objects"]
        ]
        self._send_json({"transfer": "basic", "objects": objects})

    def _lfs_put(self, match, body):
        assert hashlib.sha256(body).hexdigest() == match["oid"]
        self.hub.pushed[match["oid"]] = body
        self._send(200, b"")

    def _commit(self, _match, body):
        for line in body.decode().splitlines():
            each = json.loads(line)
            value = each["value"]
            if each["key"] == "file":
                self.hub.pushed[value["path"]] = base64.b64decode(value["content"])
            if each["key"] == "lfsFile":
                self.hub.pushed[value["path"]] = self.hub.pushed.pop(value["oid"])
        url = f"{self.hub.url}/{REPO}/commit/{COMMIT}"
        self._send_json({"commitUrl": url, "commitOid": COMMIT, "hookOutput": ""})

    def _valid(self, _match, _body):
        self._send_json({"errors": [], "warnings": []})

    def _created(self, _match, _body):
        self._send_json({"url": f"{self.hub.url}/{REPO}", "name": REPO, "id": REPO})

    def _send_json(self, value):
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status, data, headers=None, *, name=None):
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if name is not None and self.hub.drop.get(name):
            self.hub.drop[name] -= 1
            self.wfile.write(data[: len(data) // 2])
            self.hub.sent[name] += len(data) // 2
            self.close_connection = True
            self.connection.close()
            return
        with suppress(ConnectionError):  # of who has seen enough
            self.wfile.write(data)
        self.hub.sent[name] += len(data)


_ROUTES = [
    (rf"/api/models/{REPO}(/revision/[^/]+)?", _Handler._info),
    (rf"/{REPO}/resolve/[^/]+/(?P<name>.+)", _Handler._file),
    (rf"/api/models/{REPO}/preupload/[^/]+", _Handler._preupload),
    (rf"/{REPO}\.git/info/lfs/objects/batch", _Handler._lfs_batch),
    (r"/lfs/(?P<oid>\w+)", _Handler._lfs_put),
    (rf"/api/models/{REPO}/commit/[^/]+", _Handler._commit),
    (r"/api/validate-yaml", _Handler._valid),
    (r"/api/repos/create", _Handler._created),
    (rf"/api/models/{REPO}/branch/[^/]+", _Handler._created),
]


@contextmanager
def serving(folder, home, patch):
    """Serve a folder, and let huggingface_hub of this process ask there, and nowhere else."""
    hub = Hub(folder)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(constants, "HF_HOME", str(home))
    patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    patch.setattr(constants, "HF_XET_CACHE", str(home / "xet"))
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setenv("HF_TOKEN", TOKEN)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
