"""`distill-push` against a Hub that is a server of this test."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import timm

import distill


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's interface as an upload of small files asks for."""

    def do_POST(self):
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.calls.append((self.path, self.headers.get("Authorization"), content))
        if self.headers.get("Authorization") != "Bearer secret":
            return self.answer(401, {"error": "who are you?"})
        if self.path == "/api/repos/create":
            return self.answer(200, {"url": f"{self.server.address}/me/owl", "name": "me/owl"})
        if "/preupload/" in self.path:
            files = json.loads(content)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for f in files]  # fmt: skip
            return self.answer(200, {"files": modes})
        if "/commit/" in self.path:
            url = f"{self.server.address}/me/owl/commit/abc"
            return self.answer(200, {"commitUrl": url, "commitOid": "abc"})
        return self.answer(200, {})

    def do_GET(self):
        self.server.calls.append((self.path, self.headers.get("Authorization"), b""))
        self.answer(200, {"id": "me/owl", "sha": "abc", "siblings": []})

    def answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.calls, server.address = [], f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def bundle(tmp_path):
    model = timm.create_model("resnet18", num_classes=3, in_chans=3, layers=[1, 1, 1, 1],
                              channels=[4, 4, 4, 4])  # fmt: skip
    facts = {"architecture": "resnet18"}
    folder = distill.save_student(
        model, tmp_path / "student", classes=list("abc"), facts=facts, card="# a card\n"
    )
    (folder / "private.txt").write_text("not for others")
    return folder


def push(command, hub, tmp_path, *arguments, token="secret", **options):
    return command("distill-push", *arguments, HF_ENDPOINT=hub.address, HF_TOKEN=token,
                   HF_HOME=str(tmp_path / "hf"), HF_HUB_OFFLINE="0", **options)  # fmt: skip


def test_the_four_files_are_pushed_as_they_are(command, hub, bundle, tmp_path):
    done = push(command, hub, tmp_path, bundle, "me/owl", "--private", "--message", "mine")
    address, loading = done.stdout.splitlines()
    assert address.endswith("/me/owl/commit/abc")
    assert loading == 'timm.create_model("hf-hub:me/owl", pretrained=True)'
    assert "names no licence" in done.stderr
    created = json.loads(next(c for path, _, c in hub.calls if path == "/api/repos/create"))
    assert created["name"] == "owl"
    assert created.get("private") or created.get("visibility") == "private"
    commit = next(content for path, _, content in hub.calls if "/commit/" in path)
    head, *files = map(json.loads, commit.splitlines())
    assert head["value"]["summary"] == "mine"
    pushed = {f["value"]["path"]: base64.b64decode(f["value"]["content"]) for f in files}
    assert pushed.keys() == {"model.safetensors", "config.json", "distill.json", "README.md"}
    for name, content in pushed.items():
        assert content == (bundle / name).read_bytes()


def test_what_the_hub_or_the_bundle_forbids_is_one_line(command, hub, bundle, tmp_path):
    refused = push(command, hub, tmp_path, bundle, "me/owl", token="wrong", check=False)
    named = push(command, hub, tmp_path, bundle, "owl", check=False)
    nobody = push(command, hub, tmp_path, bundle, "me/owl", token="", check=False)
    before = len(hub.calls)
    (bundle / "README.md").unlink()
    (bundle / "README.md").symlink_to("/etc/hostname")
    linked = push(command, hub, tmp_path, bundle, "me/owl", check=False)
    (bundle / "README.md").unlink()
    (bundle / "model.safetensors").write_bytes(b"")
    damaged = push(command, hub, tmp_path, bundle, "me/owl", check=False)
    assert len(hub.calls) == before  # nothing is sent of a bundle that cannot be loaded
    for done, words in ((refused, "cannot push to me/owl"), (named, "owl is not OWNER/NAME"),
                        (nobody, "there is no token"),
                        (linked, "README.md is a link out of its folder"),
                        (damaged, "be read safely")):  # fmt: skip
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith("distill-push: ")
        assert words in line
