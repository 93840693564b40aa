"""Small shards for the tests: written with `tarfile`, served by a server of their own."""

import io
import tarfile
import threading
import time
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image

COLOURS = ((200, 0, 0), (0, 200, 0), (0, 0, 200))


def picture(label, number, kind="PNG"):
    """The bytes of an image of its class's colour, that says its number in its size."""
    red, green, blue = COLOURS[label % 3]
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (red + number % 50, green, blue)).save(file, kind)
    return file.getvalue()


def write_shard(path, files):
    """Write a tar of names with their content, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def samples(first=0, count=6, classes=3, prefix="s"):
    """The files of so many samples, label before image."""
    for k in range(first, first + count):
        yield f"{prefix}{k:04}.cls", str(k % classes)
        yield f"{prefix}{k:04}.png", picture(k % classes, k)


def write_shards(root, train=3, each=12):
    """Write shards of train, val and test, of three classes."""
    for number in range(train):
        write_shard(root / f"train-{number:04}.tar", samples(number * each, each))
    write_shard(root / "val-0000.tar", samples(0, each, prefix="v"))
    write_shard(root / "test-0000.tar", samples(0, each, prefix="t"))
    return root


class Server(ThreadingHTTPServer):
    """A server that writes down what it was asked for, and fails as it is told to.

    Where it has a `signature` it answers only those who give it.

    What is planned holds for the next requests of a path by a method: `GET`, `HEAD`, or both.
    """

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), partial(Unreliable, directory=str(folder)))
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.asked, self.planned, self.signature = [], {}, ""

    def refuse(self, path, times, status=503, methods=("GET",)):
        """Answer with a status."""
        self.plan(path, times, methods, lambda handler: handler.send_error(status))

    def cut(self, path, times):
        """Send a hundred bytes of what was to be more."""
        self.plan(path, times, ("GET",), Unreliable.send_a_part)

    def plan(self, path, times, methods, answer):
        """Answer in a way of the test's own."""
        self.planned |= {(method, path): [times, answer] for method in methods}

    def handle_error(self, request, client_address):
        """Say nothing of clients that are gone."""


class Unreliable(SimpleHTTPRequestHandler):
    """What answers one request."""

    def log_message(self, *words):
        """Say nothing."""

    def send_head(self):
        """Answer as planned, or as the base does."""
        self.server.asked.append(f"{self.command} {self.path}")
        path, _, query = self.path.partition("?")
        if self.server.signature and (query != self.server.signature or self.command == "HEAD"):
            self.send_error(403)  # as stores do, where an address is signed for one method
            return None
        plan = self.server.planned.get((self.command, path), [0, None])
        if plan[0] <= 0:
            return super().send_head()
        plan[0] -= 1
        plan[1](self)
        return None

    def hang_up(self):
        """End the connection without an answer."""
        self.close_connection = True

    def dribble(self, seconds, parts=20):
        """Send a file in so many parts, which take so long together."""
        content = Path(self.translate_path(self.path)).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        size = -(-len(content) // parts)
        for start in range(0, len(content), size):
            time.sleep(seconds / parts)
            self.wfile.write(content[start : start + size])

    def send_a_part(self):
        """Promise a file and send a hundred bytes of it."""
        self.send_response(200)
        self.send_header("Content-Length", "10000")
        self.end_headers()
        self.wfile.write(bytes(100))
        self.close_connection = True


@contextmanager
def served(folder):
    """Serve a folder at 127.0.0.1; yield the server, which knows its `address`."""
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def lose(data, *paths):
    """Remove shards that this process may have open."""
    files = data.train.load.files
    for number in list(files.open_shards):
        files._close(number)
    for path in paths:
        path.unlink()
