"""A Hugging Face hub of one model on this machine: as much of its HTTP interface as fetching a snapshot takes."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """files: name -> bytes; large: the names that have a sha256 (as with git LFS).

    corrupt: names whose last byte is sent wrong. stall_after: bytes of a large file after which the server waits
    until it is closed. status, error_code: what every question is answered with, instead of an answer. requests: what
    was asked for, as (method, path).
    """

    def __init__(self, files, large=()):
        self.files, self.large = dict(files), set(large)
        self.corrupt, self.stall_after, self.status, self.error_code = set(), None, None, None
        self.requests = []
        self.closed, self.stalled = threading.Event(), threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self.closed.set()
        self._server.shutdown()
        self._server.server_close()

    def count(self, method, name):
        return sum(m == method and path.endswith("/" + name) for m, path in self.requests)

    def sha256(self, name):
        return hashlib.sha256(self.files[name]).hexdigest()

    def blob_id(self, name):
        data = self.files[name]
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self._answer(with_body=False)

    def do_GET(self):
        self._answer(with_body=True)

    def _answer(self, with_body):
        hub, path = self.hub, urlsplit(self.path).path
        hub.requests.append((self.command, path))
        if hub.status is not None:
            self._send(hub.status, b"{}", {"X-Error-Code": hub.error_code or "None"}, with_body)
        elif "/resolve/" in path and path.rsplit("/", 1)[1] in hub.files:
            self._send_file(path.rsplit("/", 1)[1], with_body)
        elif path.startswith("/api/models/org/tiny/tree/"):
            self._send_json([self._entry(name, "path", "oid", "oid") for name in hub.files], with_body)
        elif path.startswith("/api/models/org/tiny"):
            siblings = [self._entry(name, "rfilename", "blobId", "sha256") for name in hub.files]
            self._send_json({"id": "org/tiny", "sha": COMMIT, "siblings": siblings}, with_body)
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body)

    def _entry(self, name, path_key, blob_key, sha_key):
        size = len(self.hub.files[name])
        entry = {"type": "file", path_key: name, "size": size, blob_key: self.hub.blob_id(name)}
        if name in self.hub.large:
            entry["lfs"] = {sha_key: self.hub.sha256(name), "size": size, "pointerSize": 100}
        return entry

    def _send_json(self, value, with_body):
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"}, with_body)

    def _send_file(self, name, with_body):
        hub, data = self.hub, self.hub.files[name]
        if name in hub.corrupt:
            data = data[:-1] + bytes([data[-1] ^ 1])
        etag = hub.sha256(name) if name in hub.large else hub.blob_id(name)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
        self._send(200, data, headers, with_body, stall=name in hub.large)

    def _send(self, status, body, headers, with_body, stall=False):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not with_body:
            return
        if stall and self.hub.stall_after is not None:
            self.wfile.write(body[: self.hub.stall_after])
            self.wfile.flush()
            self.hub.stalled.set()
            self.hub.closed.wait(60)
            self.close_connection = True
        else:
            self.wfile.write(body)

    def log_message(self, *_):
        pass
