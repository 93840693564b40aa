"""Pictures without labels: what the installed commands make of them, by their files."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

SHARED = ("data=folder", "data.root=photos", "data.image_size=16", "data.num_workers=0",
          "trainer.accelerator=cpu", "trainer.max_epochs=2", "teacher.fit.max_epochs=1",
          "teacher.fit.batch_size=8", "logger=none")  # fmt: skip
BESIDE = ("data.unlabeled=more", "data.batch_size=8")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two classes of noise, red and blue, and more of both without labels."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)

    def write(path, number):
        path.parent.mkdir(parents=True, exist_ok=True)
        tint = np.array([120, 0, 0] if number % 2 else [0, 0, 120])
        Image.fromarray((rng.integers(0, 90, (16, 16, 3)) + tint).astype(np.uint8)).save(path)

    for part, count in (("train", 40), ("test", 12)):
        for number in range(count):
            write(root / "photos" / part / "ab"[number % 2] / f"{number}.png", number)
    for number in range(30):
        write(root / "more" / ("deep/er" if number % 3 else "") / f"{number}.png", number)
    return root


def hashes(files):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def weights(run):
    return hashes([run / "student" / "model.safetensors"])["model.safetensors"]


@pytest.mark.slow
def test_a_store_that_is_filled_ahead_or_as_training_goes_gives_the_same_student(
    command, pictures, tmp_path
):
    own = {"folder": pictures, "DISTILL_CACHE": str(tmp_path / "cache")}
    ahead = f"store.path={tmp_path / 'ahead'}"
    filled = command("distill", *SHARED, *BESIDE, "store=disk", "hydra.run.dir=a", **own)
    assert (
        "each batch: 4 labelled and 4 of 30 unlabelled pictures; an epoch is one pass over the 36 "
        "labelled, and shows 36 of the unlabelled"
    ) in filled.stdout
    command("distill-store", *SHARED, *BESIDE, ahead, "hydra.run.dir=b", **own)
    views = sorted((tmp_path / "ahead").glob("*/view-*.bin"))
    before = hashes(views)
    command("distill", *SHARED, *BESIDE, "store=disk", ahead, "hydra.run.dir=c", **own)
    assert hashes(views) == before  # nothing was left to ask
    assert weights(pictures / "a") == weights(pictures / "c")
    summary = json.loads((pictures / "a" / "summary.json").read_text())
    assert summary["images"] == {"train": 36, "val": 4, "test": 12, "unlabeled": 30}
    assert summary["unlabeled"] == {
        "from": "more", "images": 30, "left_out": 0, "share": 0.5, "per_batch": 4,
        "labelled_per_batch": 4, "views_shown": 72,
    }  # fmt: skip
    for page in ("report.html", "student/README.md"):
        assert "30 pictures without labels" in (pictures / "a" / page).read_text()
    # The teacher and the baseline are those of a run that has only the labelled half of a batch.
    alone = command("distill", *SHARED, "data.batch_size=4", "hydra.run.dir=d", **own)
    assert alone.stdout.count("trained before") == 2
    baselines = [json.loads((pictures / run / "summary.json").read_text())["baseline"]["nll"]
                 for run in "ad"]  # fmt: skip
    assert baselines[0] == baselines[1]


@pytest.mark.slow
def test_jobs_that_share_a_process_learn_from_them_as_alone(command, pictures, cache):
    own = {"folder": pictures}
    quick = (*SHARED, *BESIDE, "baseline=false", "report=false")
    command("distill", *quick, "objective.temperature=2", "hydra.run.dir=one", **own)
    command("distill", "-m", *quick, "objective.temperature=2,6", "hydra.sweep.dir=many", **own)
    jobs = sorted(path.parent for path in (pictures / "many").glob("*/summary.json"))
    assert len(jobs) == 2
    assert weights(pictures / "one") == weights(jobs[0]) != weights(jobs[1])


def test_they_are_refused_where_no_teacher_would_teach_on_them(command, pictures):
    for objective in ("supervised", "gce"):
        done = command("distill", *SHARED, *BESIDE, f"objective={objective}", folder=pictures,
                       check=False)  # fmt: skip
        assert done.returncode == 2
        assert done.stderr.startswith("distill: data.unlabeled: no term of this objective")
        assert len(done.stderr.splitlines()) == 1
