"""A hub on this machine, which answers what `huggingface_hub` asks while it uploads files."""

import base64
import http.server
import json
import threading


class FakeHub(http.server.ThreadingHTTPServer):
    """Holds one repository at most.

    Attributes:
        token: the only one that is accepted.
        repository, private: what was made; None: nothing.
        files: {name: content} of the last commit.
        commits: their number.
    """

    daemon_threads = True

    def __init__(self, token="hf_right"):
        super().__init__(("127.0.0.1", 0), Handler)
        self.token, self.repository, self.private = token, None, None
        self.files, self.objects, self.commits = {}, {}, 0
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *_):
        pass

    def answer(self, value, status=200):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def handle_request(self):
        hub = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        if path.startswith("/objects/"):  # of large files, by a signed address without the token
            hub.objects[path.rpartition("/")[2]] = body
            return self.answer({})
        if self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.answer({"error": "Invalid username or password."}, 401)
        if path == "/api/whoami-v2":
            return self.answer({"name": "me", "type": "user", "orgs": []})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if asked["organization"] != "me":
                return self.answer({"error": "You don't have the rights to create it"}, 403)
            url = {"url": f"{hub.url}/{name}"}
            if hub.repository == name:
                return self.answer(url | {"error": "You already created this model repo"}, 409)
            private = bool(asked.get("private") or asked.get("visibility") == "private")
            hub.repository, hub.private = name, private
            return self.answer(url)
        if path == f"/api/models/{hub.repository}":
            return self.answer(
                {"id": hub.repository, "private": hub.private, "siblings": [], "tags": []}
            )
        if path == f"/api/models/{hub.repository}/preupload/main":
            return self.answer(
                {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs"
                            if file["path"].endswith("safetensors")
                            else "regular",
                            "shouldIgnore": False,
                        }
                        for file in json.loads(body)["files"]
                    ]
                }
            )
        if path == f"/{hub.repository}.git/info/lfs/objects/batch":
            objects = [
                each | {"actions": {"upload": {"href": f"{hub.url}/objects/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if path == f"/api/models/{hub.repository}/commit/main":
            hub.commits += 1
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.objects[value["oid"]]
            return self.answer(
                {
                    "success": True,
                    "commitOid": "0" * 40,
                    "commitUrl": f"{hub.url}/{hub.repository}/commit/0",
                }
            )
        return self.answer({"error": f"no {path}"}, 404)

    do_GET = do_POST = do_PUT = handle_request
