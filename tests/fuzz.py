"""Files from strangers, damaged at random: what opens them ends well or in one line, and no other.

`scripts/fuzz` does this ten thousand times, the test suite a few.
"""

import contextlib
import copy
import json
import random
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import yaml
from matplotlib.figure import Figure

import distill
from distill.models.build import ModelSpec, build_model
from distill.models.weights import DataShape
from distill.report import write_run_page, write_sweep_page

SECONDS = 30  # that one file may take
SUSPECT = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect",
           "pickle.find_class", "ctypes.dlopen")  # fmt: skip
MARKUP = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{7*7}}${oc.env:HOME}]]>"
VALUES = (None, True, -1, 0, 1e308, float("nan"), float("inf"), 10**30, -(10**30), "", "1", MARKUP,
          "=1+1", "../../../etc/passwd", [], [[]], {}, {"_target_": "os.system"},
          "${oc.env:HOME}", "\x1b[2J", "a" * 10**4, [1] * 200, "\ud800")  # fmt: skip
seen = []
watching = False


def watch(event, arguments):
    if watching and event.startswith(SUSPECT):
        seen.append((event, arguments))


sys.addaudithook(watch)  # hooks stay for good: this one looks only when it is told to


@contextlib.contextmanager
def watched():
    """Fail if what runs inside takes long, or starts, opens or looks up what a file may not."""
    global watching

    def late(*_):
        raise AssertionError(f"it takes more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    watching = True
    try:
        yield
    finally:
        watching = False
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        assert not seen, seen


def bytes_mutated(content, generator):
    """Return bytes that differ in a few places, are cut, doubled, or have a part moved."""
    content = bytearray(content)
    for _ in range(generator.choice((1, 1, 2, 8))):
        place = generator.randrange(len(content))
        kind = generator.randrange(6)
        if kind == 0:
            content[place] ^= 1 << generator.randrange(8)
        elif kind == 1:
            content[place : place + generator.randrange(1, 9)] = generator.randbytes(4)
        elif kind == 2:
            del content[place : place + generator.choice((1, 2, 16, 10**6))]
        elif kind == 3:
            digits = generator.choice((b"-1", b"0", b"1e999", b"NaN", b"99999999999", b'""', b"[]"))
            content[place:place] = digits
        elif kind == 4:
            other = generator.randrange(len(content))
            content[place : place + 8] = content[other : other + 8]
        else:
            content[place:place] = content[place : place + 64] * generator.choice((1, 50))
        if not content:
            break
    return bytes(content)


def places_in(value):
    """Return every container and key within a value."""
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    found = [(value, key) for key in keys]
    return found + [place for key in keys for place in places_in(value[key])]


def value_mutated(value, generator):
    """Change a plain value, in place, at a few places."""
    for _ in range(generator.choice((1, 1, 1, 2, 5))):
        places = places_in(value)
        if not places:
            return
        holder, key = generator.choice(places)
        kind = generator.randrange(8)
        if kind == 0 and isinstance(holder, dict):
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[generator.choice((MARKUP, "=x", "\x1b[2J"))] = holder.pop(key)
        elif kind == 2:
            other, name = generator.choice(places)
            with contextlib.suppress(LookupError):  # the place may be gone
                holder[key] = json.loads(json.dumps(other[name]))
        else:
            holder[key] = copy.deepcopy(generator.choice(VALUES))


def damage(path, original, generator):
    """Write one of a folder's files anew, damaged: as bytes, or what it says."""
    if path.suffix in (".json", ".yaml") and generator.random() < 0.8:
        content = json.loads(original) if path.suffix == ".json" else yaml.safe_load(original)
        value_mutated(content, generator)
        text = json.dumps(content) if path.suffix == ".json" else yaml.safe_dump(content)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        return
    head = original[: generator.choice((300, 3000, len(original)))]
    path.write_bytes(bytes_mutated(head, generator) + original[len(head) :])


def outcome(action, place):
    """Return whether an action succeeded; its error has to be one line that names the place."""
    try:
        with watched():
            action()
    except (ValueError, OSError) as error:
        from distill.config.explain import one_line
        from distill.utils.errors import printable

        line = printable(one_line(error))
        assert len(line.splitlines()) == 1
        assert Path(place).name in line, line
        return False
    return True


def load(bundle):
    """Open a bundle as the commands do: by itself, as a student to go on from, and as a teacher."""
    model = distill.load_student(bundle, calibrated="vector")
    assert all(value.isfinite().all() for value in model.state_dict().values())
    shape = DataShape(3, 1, (32, 32))
    build_model(ModelSpec(checkpoint=str(bundle)), shape, "student", any_classes=True)


def report(folder):
    """Write the pages of a run or a sweep, which have to be inert."""
    single = (folder / "metrics.csv").exists()
    page = write_run_page(folder) if single else write_sweep_page([folder], folder / "report.html")
    text = page.read_text(encoding="utf-8")
    assert text.count("<script") == 1
    assert "<img src=x" not in text
    assert text.rstrip().endswith("</html>")


def undrawn(canvas, file, **_):
    """Stand for the slowest part of a page, in which nothing of a stranger's is left to decide."""
    file.write('<svg viewBox="0 0 1 1"></svg>')


def fuzz(kind, folder, count, seed=0):
    """Damage a folder `count` times, and return how often it was opened all the same.

    Args:
        kind: what opens it, `load` or `report`.
        folder: a bundle, a run or a sweep; it is left as it was.
        count: how many times.
        seed: of the damage.
    """
    generator = random.Random(f"{kind} {seed}")
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix not in (".html", ".md"))
    originals = {path: path.read_bytes() for path in files}
    around = listing(folder)
    opened = Counter()
    for number in range(count):
        path = generator.choice(files)
        damage(path, originals[path], generator)
        try:
            with quickly(number % 20 > 0):
                opened[outcome(lambda: globals()[kind](folder), folder)] += 1
        except BaseException:
            kept = folder.parent / f"found-{kind}-{number}"
            shutil.copytree(folder, kept, dirs_exist_ok=True)
            print(f"kept in {kept}, {path.name} was damaged", file=sys.stderr)
            raise
        finally:
            path.write_bytes(originals[path])
        assert listing(folder) == around, f"number {number} wrote outside {folder}"
    return opened


def quickly(quick):
    """Leave out the drawing of figures, where that is asked for."""
    return mock.patch.object(Figure, "savefig", undrawn) if quick else contextlib.nullcontext()


def listing(folder):
    """Return what lies beside a folder."""
    return sorted(folder.parent.iterdir())
