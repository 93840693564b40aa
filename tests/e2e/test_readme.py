"""Every command and every program in the README and in docs/ runs as printed."""

import re
import shlex
import tarfile

import pytest
from PIL import Image

from distill.data.sources.shard_writing import write_shards
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
README, ALL = TEXTS[PAGES[0]], "\n".join(TEXTS.values())


def commands(text):
    """Return the commands that a page shows."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    lines = [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


SHELL = commands(ALL)
MODULES = re.findall(r"```py\n(.*?)```", ALL, re.S)  # what a page lets people put into a file
PYTHON = re.findall(r"```python\n(.*?)```", ALL, re.S)
NO_HUB = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "none", "HF_HUB_OFFLINE": "0"}


def make_photos(folder, count):
    for split, number in (("train", count), ("val", 8)):
        for label, colour in (
            ("blue", (40, 60, 200)),
            ("green", (40, 200, 60)),
            ("red", (200, 40, 40)),
        ):
            (folder / split / label).mkdir(parents=True)
            for i in range(number):
                shade = tuple(min(c + i, 255) for c in colour)
                Image.new("RGB", (40, 36), shade).save(folder / split / label / f"{i}.png")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    make_photos(folder / "photos", 60)
    files = sorted((folder / "photos" / "train").glob("*/*.png"))
    rows = [f"train/{file.parent.name}/{file.name},{file.parent.name}\n" for file in files]
    (folder / "photos" / "labels.csv").write_text("path,label\n" + "".join(rows))
    list(write_shards(folder / "photos", folder / "shards", workers=1))
    costs = [[0 if i == j else 5 if i == 3 else 1 for j in range(10)] for i in range(10)]
    (folder / "costs.csv").write_text("\n".join(",".join(map(str, row)) for row in costs))
    with tarfile.open(folder / "photos.tar", "w") as archive:
        archive.add(folder / "photos" / "train", "photos")
    return folder


@pytest.fixture(scope="module")
def ran():
    """What the README's commands have answered so far: each runs once."""
    return {}


@pytest.fixture
def run_line(command, workplace, ran):
    """Run a command of the README, after those whose runs it names."""

    def run(line):
        if line not in ran:
            make_inputs(line)
            ran[line] = command(*adapted(line, workplace), folder=workplace, check=False,
                                **(NO_HUB if line.startswith("distill-push") else {}))  # fmt: skip
        return ran[line]

    def make_inputs(text):
        for name in re.findall(r"(?<!run\.dir=)(runs/\w+)", text):
            done = run(next(line for line in SHELL if f"hydra.run.dir={name}" in line.split()))
            assert done.returncode == 0, done.stdout + done.stderr

    run.make_inputs = make_inputs
    return run


def adapted(line, folder):
    """Return a command's words; where the README's would take minutes, a small form of them."""
    words = shlex.split(line)
    if words[0].startswith("scripts/"):
        words[0] = str(ROOT / words[0])
    if "experiment=fashion_mnist" in words:  # the same command on files of the same format
        if not (folder / "idx").exists():
            write_idx(folder / "idx")
        words.append(f"data.root={folder / 'idx'}")
    if "experiment=cifar100" in words:
        words = [word for word in words if not word.startswith("data.root=")] + tiny_cifar(folder)
    if words[0].endswith("studies/cifar100"):
        (folder / "mine.py").write_text(MODULES[0])
        words = small_table(words)
    words = ["seed=0,1" if word == "seed=0,1,2,3,4" else word for word in words]
    if words[0].endswith("studies/objectives"):  # the same study of fewer runs
        words += ["--objectives", "logit_mse", "--seeds", "1", "--out", "study"]
    return words


def tiny_cifar(folder):
    """Return the overrides of the literature's protocol on a few made-up pictures of its size."""
    import numpy as np

    file, random = folder / "tiny.npz", np.random.default_rng(0)
    if not file.exists():
        counts = {"train": 60, "test": 20}
        images = {f"x_{k}": random.integers(0, 256, (n, 32, 32, 3), np.uint8)
                  for k, n in counts.items()}  # fmt: skip
        labels = {f"y_{k}": np.arange(n) % 5 for k, n in counts.items()}
        np.savez(file, **images, **labels)
    return ["data=arrays", f"data.root={file}", "data.val_fraction=0.2", "data.batch_size=16",
            "data.view={pad: 4, flip: true}", "trainer.max_epochs=1"]  # fmt: skip


def small_table(words):
    """Return a command of the table with one pair of small models on digits, for one epoch."""
    kept, option = [words[0]], ""
    for word in words[1:]:
        option = word if word.startswith("--") else option
        if option in ("--dry-run", "--budget", "--method"):
            kept.append(word)
    return [*kept, "--pairs", "slim_resnet10_8:slim_resnet10_4", "--methods", "kd", "--epochs", "1",
            "--data", "data=digits", "--override", "data.val_fraction=0.1"]  # fmt: skip


def write_idx(folder):
    """Write a small data set in the format and with the names of Fashion-MNIST."""
    import numpy as np

    folder.mkdir()
    random = np.random.default_rng(0)
    for part, count in (("train", 400), ("t10k", 100)):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            (folder / f"{part}-{kind}-ubyte").write_bytes(header + array.tobytes())


def test_the_readme_shows_what_it_should():
    assert SHELL[:2] == ["scripts/distill", "scripts/test"]
    assert len(README.splitlines()) <= 200
    assert len(SHELL) == len(set(SHELL)) >= 10
    assert len(PYTHON) == 2
    assert "scripts/test" in (ROOT / ".ci" / "run").read_text()
    assert len(PYTHON[1].split("import TensorDataset", 1)[-1].splitlines()) <= 20


@pytest.mark.parametrize("line", [line for line in commands(README) if line != "scripts/test"])
def test_a_command_of_the_readme_runs(run_line, line):
    check(run_line, line)


@pytest.mark.parametrize("line", [line for line in SHELL if line not in commands(README)])
def test_a_command_of_the_docs_runs(run_line, line):
    check(run_line, line)


def check(run_line, line):
    done = run_line(line)
    if line.startswith("distill-push"):  # the rest has a test of its own
        assert done.stderr.startswith("distill-push: cannot push to OWNER/NAME")
        return
    assert done.returncode == 0, done.stdout + done.stderr
    endings = (
        "test split",
        "sweep: val decides",
        "| baseline |",
        "both.html",
        "answers asked for now",
        "clean and in 15 epochs",
        "24 images",
        "export.json in ",
        "1 of 10 claims checked in ",
        "| all | ",
        " cells: ",
        "in all: ",
    )
    assert any(ending in done.stdout + done.stderr for ending in endings)
    told = ("+ ", "installing", "distill-predict: ")
    noise = [row for row in done.stderr.splitlines() if not row.startswith(told)]
    assert not noise


def test_the_programs_of_the_readme_run(command, run_line, workplace):
    for number, program in enumerate(PYTHON):
        run_line.make_inputs(program)
        source = program if "import distill" in program else f"import distill\n{program}"
        (workplace / f"program{number}.py").write_text(source)
        command("python", f"program{number}.py", folder=workplace)
    files = {p.name for p in (workplace / "my_student").iterdir()}
    assert {"model.safetensors", "config.json"} <= files


def test_every_objective_has_its_row_with_the_command_of_its_file():
    table = TEXTS[ROOT / "docs" / "objectives.md"]
    for path in (ROOT / "conf" / "objective").glob("*.yaml"):
        first = path.read_text().splitlines()[0].removeprefix("# ")
        row = next(row for row in table.splitlines() if row.startswith(f"| `{path.stem}` |"))
        assert row.endswith(f"| `{first}` |")


def test_the_pictures_are_there():
    found = [(page, *picture) for page, text in TEXTS.items()
             for picture in re.findall(r"!\[([^\]]+)\]\(([^)]+)\)", text)]  # fmt: skip
    assert len(found) == 2
    for page, words, path in found:
        assert len(words) > 20
        assert (page.parent / path).read_bytes().startswith(b"\x89PNG")
        assert (page.parent / path).stat().st_size < 300_000


def test_links_lead_to_pages_that_are_there():
    for page, text in TEXTS.items():
        for link in re.findall(r"(?<!!)\[[^\]]+\]\(([^)#]+)\)", text):
            assert "://" in link or (page.parent / link).exists(), f"{page.name}: {link}"
