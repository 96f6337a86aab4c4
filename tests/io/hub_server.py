"""A local hub with the routes of the Hugging Face hub that pushing and loading use."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

from huggingface_hub import constants, file_download

OWNER, STRANGER = "hf_owner", "hf_stranger"


class Hub(ThreadingHTTPServer):
    """`commits` of repository -> branch -> newest last, each (sha, message, files); `asked` is each request's path."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.commits, self.private, self.asked = {}, {}, []
        self.address = f"http://127.0.0.1:{self.server_port}"
        # the default interval of 0.5 s would delay the end of each test
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def put(self, name, files, branch="main", message="by hand"):
        """Add a commit: files are bytes by name, added to those of the commit before."""
        history = self.commits.setdefault(name, {}).setdefault(branch, [])
        whole = (history[-1][2] if history else {}) | files
        sha = hashlib.sha1(json.dumps([name, branch, len(history)]).encode()).hexdigest()
        history.append((sha, message, whole))
        return sha

    def commit(self, name, revision):
        branches = self.commits[name]
        if revision in branches:
            return branches[revision][-1]
        return next((c for history in branches.values() for c in history if c[0] == revision), None)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self._answer()

    def do_HEAD(self):
        self._answer()

    def do_POST(self):
        self._answer()

    def _answer(self):
        hub, path = self.server, unquote(urlparse(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.asked.append(path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if self.command == "POST" and path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if self.command == "POST" and token != OWNER:
            return self._fail(401 if not token else 403, None, "not yours")
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"user/{asked['name']}"
            if name in hub.commits:
                return self._json({"url": f"{hub.address}/{name}"}, 409)
            hub.private[name] = asked.get("private") is True or asked.get("visibility") == "private"
            hub.put(name, {".gitattributes": b""})
            return self._json({"url": f"{hub.address}/{name}"})
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(\w+)/(.+)", path)
        if match is None:
            match = re.fullmatch(r"/([^/]+/[^/]+)/(resolve)/(.+)", path)
        name, what, rest = match.groups() if match else (None, None, None)
        if name not in hub.commits or (hub.private.get(name) and token != OWNER):
            return self._fail(401, "RepoNotFound" if token else None, "Invalid username or password.")
        if what == "branch":
            branches = hub.commits[name]
            branches.setdefault(rest, list(branches["main"]))
            return self._json({})
        revision, _, file = rest.partition("/") if what == "resolve" else (rest, "", "")
        found = hub.commit(name, revision)
        if found is None:
            return self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        sha, _, files = found
        if what == "revision":
            return self._json({"id": name, "sha": sha, "siblings": [{"rfilename": key} for key in files]})
        if what == "tree":
            tree = [{"type": "file", "path": k, "size": len(v), "oid": _oid(v)} for k, v in files.items()]
            return self._json(tree)
        if what == "preupload":
            asked = [file["path"] for file in json.loads(body)["files"]]
            return self._json({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in asked]})
        if what == "commit":
            head, *operations = [json.loads(line) for line in body.splitlines()]
            values = [operation["value"] for operation in operations]
            added = {value["path"]: base64.b64decode(value["content"]) for value in values}
            proposed = "create_pr=1" in urlparse(self.path).query
            branch = "refs/pr/1" if proposed else revision
            sha = hub.put(name, added, branch, head["value"]["summary"])
            answer = {"commitUrl": f"{hub.address}/{name}/commit/{sha}", "commitOid": sha, "hookOutput": ""}
            return self._json(answer | ({"pullRequestUrl": f"{hub.address}/{name}/discussions/1"} if proposed else {}))
        if file not in files:
            return self._fail(404, "EntryNotFound", "Entry not found")
        return self._send(200, files[file], {"ETag": f'"{_oid(files[file])}"', "X-Repo-Commit": sha})

    def _json(self, content, status=200):
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _fail(self, status, code, message):
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(self, status, content, headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _oid(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def ask(monkeypatch, address):
    """Make huggingface_hub use the server at an address."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    urls = address + "/{repo_id}/resolve/{revision}/{filename}"  # derived from ENDPOINT at import
    for module in (constants, file_download):  # versions before 1 have it in both
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", urls, raising=False)
