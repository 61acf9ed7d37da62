"""A Hugging Face hub on loopback: the parts of its protocol that downloading a model needs."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


@dataclass
class Hub:
    """Attributes:
    repos: repository -> file -> bytes; every revision of ``revisions`` has the same ones.
    gated: repositories that want the token "good".
    cut_after: file -> bytes after which its connection drops, once.
    stalled: a file of which only the first half is sent as long as it is named here; has_stalled: it was asked for.
    requests: (method, path, Range header) of every request.
    """

    repos: dict[str, dict[str, bytes]]
    revisions: tuple[str, ...] = ("main",)
    gated: set[str] = field(default_factory=set)
    cut_after: dict[str, int] = field(default_factory=dict)
    stalled: str | None = None
    has_stalled: threading.Event = field(default_factory=threading.Event)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    endpoint: str = ""

    def commit(self, repo: str, revision: str) -> str:
        return hashlib.sha1(f"{repo} {revision}".encode()).hexdigest()

    def fetched(self) -> set[str]:
        """Files whose bytes were asked for."""
        return {
            path.split("/resolve/")[1].split("/", 1)[1]
            for m, path, _ in self.requests
            if "/resolve/" in path and m == "GET"
        }


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def log_message(self, *args: object) -> None:
            pass

        def answer(self, with_body: bool) -> None:
            path = urlsplit(self.path).path.removeprefix("/")
            hub.requests.append((self.command, path, self.headers.get("Range")))
            words = path.removeprefix("api/models/").split("/")
            repo, kind = "/".join(words[:2]), words[2] if len(words) > 2 else ""
            if repo not in hub.repos:
                return self.refuse(401, "RepoNotFound")
            if repo in hub.gated and self.headers.get("Authorization") != "Bearer good":
                return self.refuse(403 if self.headers.get("Authorization") else 401, "GatedRepo")
            revision = words[3] if len(words) > 3 else "main"
            commits = {name: hub.commit(repo, name) for name in hub.revisions}
            commit = commits.get(revision, revision if revision in commits.values() else None)
            if commit is None:
                return self.refuse(404, "RevisionNotFound")
            files = hub.repos[repo]
            if path.startswith("api/") and kind == "tree":
                tree = [{"type": "file", "path": f, "size": len(d), "oid": etag(d)} for f, d in files.items()]
                return self.send(200, json.dumps(tree).encode(), with_body)
            if path.startswith("api/"):
                siblings = [{"rfilename": f} for f in files]
                facts = {"id": repo, "modelId": repo, "sha": commit, "private": False, "tags": [], "siblings": siblings}
                return self.send(200, json.dumps(facts).encode(), with_body)
            file = "/".join(words[4:])
            if file not in files:
                return self.refuse(404, "EntryNotFound")
            self.send_file(file, files[file], commit, with_body)

        def send_file(self, file: str, data: bytes, commit: str, with_body: bool) -> None:
            headers = {"ETag": f'"{etag(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
            if with_body and file == hub.stalled:
                hub.has_stalled.set()
                self.send(200, data, True, headers, len(data) // 2)
                while hub.stalled:
                    time.sleep(0.02)
                return
            asked = self.headers.get("Range")
            if asked is None:
                return self.send(200, data, with_body, headers, hub.cut_after.pop(file, None) if with_body else None)
            start = int(asked.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self.send(206, data[start:], with_body, headers)

        def send(
            self,
            status: int,
            data: bytes,
            with_body: bool,
            headers: dict[str, str] | None = None,
            cut: int | None = None,
        ) -> None:
            self.send_response(status)
            for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if with_body:
                self.wfile.write(data[:cut])
            if cut is not None:
                self.close_connection = True

        def refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
