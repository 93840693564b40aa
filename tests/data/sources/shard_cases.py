"""Small shards for the tests: written with `tarfile`, served by a server of their own."""

import io
import tarfile
import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

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


class Silent(SimpleHTTPRequestHandler):
    """A server that writes down what it was asked for, and may refuse."""

    def log_message(self, *words):
        pass

    def do_GET(self):
        self.server.asked.append(self.path)
        if self.server.refusals > 0:
            self.server.refusals -= 1
            self.send_error(503)
        else:
            super().do_GET()


@contextmanager
def served(folder):
    """Serve a folder at 127.0.0.1; yield the server, which knows its `address`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=str(folder)))
    server.asked, server.refusals = [], 0
    server.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
