"""A step as one function of static buffers: called on a CPU, it gives the eager student.

On a CPU the very function that a GPU captures is called instead, on the same buffers.
"""

import re
from functools import partial

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from distill.config import build
from distill.config.overrides import CONF
from distill.data.batch import Batch
from distill.sweep.lockstep import in_turns
from distill.teacher.cached import CachedTeacher
from distill.teacher.store import TeacherStore
from distill.teacher.teacher import Teacher
from distill.training import capture, fit, graph, resume, teachers
from distill.training.callbacks.checkpoints import LatestCheckpoint
from distill.training.presented import Presentation
from distill.training.untrained import build_untrained

QUICK = ("trainer.max_epochs=2", "trainer.limit_train_batches=5",
         "trainer.accelerator=cpu", "logger=none", "callbacks=none", "baseline=false",
         "report=false", "data.batch_size=30")  # fmt: skip
TAUGHT = ("teacher.fit.max_epochs=1",)
ALONE = ("teacher=none", "objective=supervised")


@pytest.fixture
def fitted(tmp_path, cache):
    """Train, and return the student's weights, what was logged, and how many steps were graphs."""

    def trained(*overrides, name="run"):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            paths = (f"paths.output_dir={tmp_path / name}", f"paths.cache={cache}",
                     f"store.path={tmp_path / 'answers'}")  # fmt: skip
            taught = () if "teacher=none" in overrides else TAUGHT
            cfg = compose("train", overrides=[*paths, *QUICK, *taught, *overrides])
        cfg, data = resume.with_checkpoint(cfg), build.build_data(cfg)
        teacher = teachers.prepare_teacher(cfg, data)
        student, _ = fit.fit(cfg, data, teacher)
        metrics = (tmp_path / name / "metrics.csv").read_text()
        return student.student.state_dict(), metrics, student.graph

    return trained


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


CASES = {
    "live teacher": ("store=off",),
    "answers read, which the first epoch fills": ("store=disk", "store.views=1"),
    "no teacher": ALONE,
    "annealed temperature and weights": ("store=off", "annealing=linear", "annealing.end=4"),
    "annealed α, which reaches 1": ("store=off", "annealing=linear", "annealing.value=alpha",
                                    "annealing.end=1", "trainer.max_epochs=3"),
    "a schedule of rates and clipping": ("store=off", "trainer.gradient_clip_val=0.5",
                                         "scheduler.warmup_epochs=1"),
    "views that mix": ("store=off", "data.view={pad: 1, mixup: 0.4, cutmix: 1}"),
    "momentum": ("store=off", "optimizer.opt=sgd", "optimizer.lr=0.05"),
    "learned temperature": ("store=off", "objective=ctkd"),
    "feature maps": ("store=off", "objective=hint"),
    "a queue of negatives": ("store=off", "objective=crd", "objective.terms.contrast.queue=40"),
    "fused stages": ("store=off", "objective=reviewkd"),
    "stages' own answers, the teacher's read": ("store=disk", "store.views=1", "objective=ofa"),
    "the teacher's classifier": ("store=off", "objective=simkd"),
    "two views": ("store=auto", "objective=mlkd_two_views"),
    "two views of relations": ("store=off", "objective=rkd", "data.views_per_step=2"),
    "bf16": ("store=off", "trainer.precision=bf16-mixed"),
    "weights in bf16": ("store=off", "trainer.precision=bf16-true", "optimizer.lr=1e-2"),
    "clipped values": ("store=off", "trainer.gradient_clip_val=0.01",
                       "+trainer.gradient_clip_algorithm=value"),
    "class counts": ("store=off", "objective=ldam", "condition=long_tail", "condition.imbalance=4"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_the_step_as_one_function_gives_the_eager_student_byte_for_byte(case, fitted):
    eager, logged, none = fitted(*CASES[case], "trainer.graph=off", name="eager")
    ours, also, graph = fitted(*CASES[case], "trainer.graph=on", name="graph")
    assert none is None
    assert graph.steps >= 4
    assert same(eager, ours)
    assert logged == also


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("views", [1, 2])
def test_pictures_from_files_are_copied_into_the_buffers(fitted, tmp_path, views):
    rng = np.random.default_rng(0)
    for name, count in (("train", 24), ("val", 8), ("test", 8)):
        for label in "ab":
            (tmp_path / "pictures" / name / label).mkdir(parents=True)
            for k in range(count):
                pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "pictures" / name / label / f"{k}.png")
    own = (*ALONE, "data=folder", f"data.root={tmp_path / 'pictures'}", "data.image_size=32",
           "data.batch_size=8", "student.name=cifar_resnet8",
           f"data.views_per_step={views}")  # fmt: skip
    eager, logged, _ = fitted(*own, "trainer.graph=off", name="eager")
    ours, also, step = fitted(*own, "trainer.graph=on", name="graph")
    assert step.steps == 9
    assert same(eager, ours)
    assert logged == also


@pytest.mark.filterwarnings("ignore")
def test_a_run_goes_on_in_the_middle_of_an_epoch(fitted, monkeypatch):
    own = (
        *ALONE,
        "trainer.graph=on",
        "callbacks=checkpoints",
        "callbacks.last.every_n_train_steps=1",
    )
    whole, logged, _ = fitted(*own, name="whole")

    ended = LatestCheckpoint.on_train_batch_end

    def interrupted(self, trainer, *rest):
        ended(self, trainer, *rest)
        if trainer.global_step == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(LatestCheckpoint, "on_train_batch_end", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fitted(*own, name="killed")
    rest, also, step = fitted(*own, "resume=auto", name="killed")
    assert step.steps == 2  # of three that were left, as the first is always eager
    assert same(whole, rest)
    assert logged == also


class Baked(graph.GraphedStep):
    """A step that keeps the first learning rate it has seen, as a careless capture does."""

    def _capture(self, buffers):
        super()._capture(buffers)
        first, replay = [float(rate) for rate in buffers.rates], buffers.replay

        def baked():
            graph.set_rates(self.optimizer, first)
            replay()

        buffers.replay = baked


class Stale(graph.GraphedStep):
    """A step whose outputs stay where nobody looks, as those of a graph that are replaced."""

    def _capture(self, buffers):
        super()._capture(buffers)
        buffers.values = buffers.values.clone()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "kept"), [(graph.GraphedStep, True), (Baked, False), (Stale, False)]
)
def test_a_captured_step_is_tried_against_eager_ones(kind, kept, fitted, monkeypatch, caplog):
    caplog.set_level("INFO")
    own = (*ALONE, "trainer.limit_train_batches=12", "scheduler.warmup_epochs=1")
    eager, logged, _ = fitted(*own, "trainer.graph=off", name="eager")
    monkeypatch.setattr(capture, "GraphedStep", lambda *given, trial: kind(*given, trial=6))
    ours, also, step = fitted(*own, "trainer.graph=on", name="graph")
    assert (step.steps == 24 - 7, step.off) == (kept, not kept)
    assert same(eager, ours)  # what was tried has left no trace
    assert logged == also
    said = "on, 6 captured steps gave" if kept else "off, steps are taken eagerly (6 captured steps"
    assert said in caplog.text


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("topk", [None, 3])
def test_a_step_that_fills_a_store_is_captured_too(topk, fitted, tmp_path):
    own = ("store=disk", f"store.topk={topk or 'null'}", "trainer.max_epochs=3")
    kept = {}
    for mode in ("off", "on"):
        folder = tmp_path / f"store-{mode}"
        kept[mode] = fitted(*own, f"trainer.graph={mode}", f"store.path={folder}", name=mode)
        again = fitted(*own, f"trainer.graph={mode}", f"store.path={folder}", name=f"{mode}-again")
        assert same(kept[mode][0], again[0])  # the run that fills, and the one that reads
    assert kept["on"][2].steps == 14
    assert same(kept["off"][0], kept["on"][0])
    assert kept["off"][1] == kept["on"][1]
    files = [sorted((tmp_path / f"store-{mode}").rglob("*.bin")) for mode in ("off", "on")]
    assert len(files[0]) == len(files[1]) > 0
    for one, other in zip(*files, strict=True):
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_captured_is_taken_eagerly(fitted, monkeypatch, caplog):
    caplog.set_level("INFO")

    def broken(self, buffers):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graph.GraphedStep, "_capture", broken)
    monkeypatch.setattr(capture, "GraphedStep",
                        lambda *given, trial: graph.GraphedStep(*given, trial=3))  # fmt: skip
    eager, logged, _ = fitted(*ALONE, "trainer.graph=off", name="eager")
    ours, also, step = fitted(*ALONE, "trainer.graph=on", name="graph")
    assert step.off
    assert same(eager, ours)
    assert logged == also
    assert "cannot be captured: operation not permitted when stream is capturing)" in caplog.text


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (("trainer.accumulate_grad_batches=2",), "trainer.accumulate_grad_batches"),
        (("on_nan=skip",), "on_nan=skip"),
        (("objective.sample_selection.small_loss=0.9",), "objective.sample_selection"),
        (("callbacks=sparsity",), "Sparsity acts within a step"),
        (("callbacks=fake_quantize",), "FakeQuantize acts within a step"),
        (("trainer.precision=16-mixed",), "16-mixed scales its gradients"),
    ],
)
def test_what_stands_in_the_way_is_named(overrides, why, tmp_path, cache):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        paths = (f"paths.output_dir={tmp_path}", f"paths.cache={cache}")
        cfg = compose("train", overrides=[*paths, *QUICK, *TAUGHT, "trainer.graph=on", *overrides])
    data = build.build_data(cfg)
    untrained = build_untrained(cfg, data)
    with pytest.raises(ValueError, match=f"trainer.graph=on: .*{re.escape(why)}"):
        capture.check_graph(cfg, untrained.objective, data, untrained.trainer)


@pytest.mark.filterwarnings("ignore")
def test_a_teacher_whose_training_cannot_be_captured_is_trained_eagerly(fitted, tmp_path, caplog):
    caplog.set_level("INFO")
    data = ("teacher.fit.head_epochs=1", "teacher.fit.max_epochs=2", "store=off",
            "trainer.max_epochs=1")  # fmt: skip
    eager = fitted(*data, f"paths.cache={tmp_path / 'one'}", "trainer.graph=off", name="eager")
    ours = fitted(*data, f"paths.cache={tmp_path / 'two'}", "trainer.graph=on", name="graph")
    assert "trainer.graph: off (HeadFirst acts within a step)" in caplog.text
    assert ours[2].steps == 4
    assert same(eager[0], ours[0])


def test_an_optimiser_that_cannot_be_captured_is_named(fitted, caplog):
    caplog.set_level("INFO")
    step = fitted(*ALONE, "trainer.graph=on", "optimizer.opt=lamb", "trainer.max_epochs=1")[2]
    assert step.off
    assert "off, steps are taken eagerly (the optimiser Lamb cannot be captured)" in caplog.text


FACTS = {"teacher": "sine"}


@pytest.mark.parametrize("topk", [None, 3])
def test_answers_on_the_device_are_those_that_are_read(tmp_path, topk):
    logits = torch.randn(2, 40, 7, generator=torch.Generator().manual_seed(0))
    asked = []

    class Model(torch.nn.Module):
        num_classes = 7

        def forward(self, view):
            asked.append(len(view))
            return torch.zeros(len(view), 7)

    with TeacherStore(tmp_path, FACTS, samples=40, classes=7, views=2, topk=topk) as store:
        for view in range(2):
            store.write(view, torch.arange(40), logits[view])
        cached = CachedTeacher(Teacher(Model()), {"train": store}, device_gb=1.0)
        read = CachedTeacher(Teacher(Model()), {"train": store})
        places = set()
        for view in (0, 1, 0):
            index = torch.randperm(40)[:8]
            batch = Batch(torch.zeros(8, 1, 4, 4), torch.zeros(8).long(), index, view, "train")
            assert torch.equal(cached(batch), read(batch))
            answers = cached.resident(batch, torch.device("cpu"))
            assert answers.has(index)
            places.add(tuple(field.data_ptr() for field in answers.fields.values()))
        assert len(places) == 1  # where a captured step finds them
        assert not asked
        tight = CachedTeacher(Teacher(Model()), {"train": store}, device_gb=1e-9)
        assert torch.equal(tight(batch), read(batch))
        assert tight.resident(batch, torch.device("cpu")) is None


def test_answers_that_are_missing_are_asked_for(tmp_path):
    class Model(torch.nn.Module):
        num_classes = 7

        def forward(self, view):
            return torch.ones(len(view), 7)

    with TeacherStore(tmp_path, FACTS, samples=40, classes=7, views=2) as store:
        store.write(0, torch.arange(20), torch.zeros(20, 7))
        cached = CachedTeacher(Teacher(Model()), {"train": store}, device_gb=1.0)

        def batch(*index):
            index = torch.tensor(index)
            return Batch(torch.zeros(len(index), 1, 4, 4), index, index, 0, "train")

        assert cached(batch(1, 2)).eq(0).all()
        assert cached(batch(3, 30)).eq(torch.tensor([[0.0], [1.0]])).all()
        assert cached.resident(batch(4, 5), torch.device("cpu")) is not None
        assert store.read(0, torch.tensor([30]))[1].all()


def test_a_rate_or_a_number_is_written_where_it_has_changed():
    def settings(a, b, rate):
        return graph.Settings({"a": a, "b": b}, [rate], False)

    buffers = graph.Buffers(None, settings(0.0, 0.0, 0.0), torch.device("cpu"))
    for values in ((8.0, 0.1, 0.5), (7.3, 0.1, 0.25), (7.3, 0.1, 0.25)):
        buffers.write(settings(*values))
        assert [float(place) for place in (*buffers.numbers.values(), *buffers.rates)] == [*values]


@pytest.fixture
def in_turn(tmp_path, cache):
    """Train several students in turns, and return their weights."""

    def trained(mode, runs):
        left = {}

        def task(number, own, sharing):
            with initialize_config_dir(str(CONF), version_base="1.3"):
                cfg = compose("train", overrides=[
                    f"paths.output_dir={tmp_path / mode / str(number)}", f"paths.cache={cache}",
                    f"store.path={tmp_path}", f"trainer.graph={mode}", *QUICK, *TAUGHT, *own,
                ])  # fmt: skip
            data = build.build_data(cfg, sharing=sharing)
            untrained = build_untrained(cfg, data)
            *_, teacher = teachers.prepare_teachers(cfg, data, untrained.objective)[0]
            student, _ = fit.fit(cfg, data, teacher, untrained)
            left[number] = student.student.state_dict(), student.graph

        in_turns([partial(task, number, own) for number, own in enumerate(runs)])
        return [left[number] for number in range(len(runs))]

    return trained


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("store", [("store=off",), ("store=disk", "store.views=1")])
def test_runs_that_take_turns_share_batches_and_answers(store, in_turn, monkeypatch):
    presented = []
    made = Presentation.made
    monkeypatch.setattr(Presentation, "made", lambda self: presented.append(self) or made(self))
    runs = [(*store, f"objective.temperature={temperature}") for temperature in (2, 4, 8)]
    eager = in_turn("off", runs)
    presented.clear()
    ours = in_turn("on", runs)
    assert all(same(one[0], other[0]) for one, other in zip(eager, ours, strict=True))
    assert len(presented) == 9 + 2  # two epochs of five, the first eager; two when captured


STORED = ("store=disk", "store.views=1")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "runs",
    [
        [("store=off",), ("store=off", "objective=hint"), ("store=off", "objective=supervised")],
        [(*STORED, "store.topk=2"), (*STORED, "store.topk=5"), STORED],
        [("store=off", "assistants=[{}]"), ("store=off",), ("store=off", "seed=1")],
        [
            ("store=off",),
            ("store=off", "data.views_per_step=2"),
            ("store=off", "objective=mlkd_two_views"),
            ("store=off", "objective=mlkd"),
        ],
    ],
    ids=["objectives", "stores", "teachers and seeds", "views"],
)
def test_runs_that_take_turns_are_shown_what_is_theirs(runs, in_turn):
    in_turn("off", runs)  # what is kept is there from now on
    eager = in_turn("off", runs)
    ours = in_turn("on", runs)
    for (weights, _), (others, step) in zip(eager, ours, strict=True):
        assert step.steps == 9
        assert same(weights, others)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_captured_steps_train_as_eager_ones_on_a_gpu(case, fitted):
    long = ("trainer.accelerator=gpu", "trainer.max_epochs=4", "trainer.limit_train_batches=20")
    own = [*CASES[case], *long]
    eager = fitted(*own, "trainer.graph=off", name="eager")[0]
    again = fitted(*own, "trainer.graph=off", name="again")[0]
    ours, _, step = fitted(*own, "trainer.graph=auto", name="graph")
    assert step.steps >= 20
    for name, value in eager.items():
        if value.is_floating_point():
            spread = (again[name] - value).abs().max() * 4
            assert (ours[name] - value).abs().max() <= spread + 1e-2 * value.abs().max()
