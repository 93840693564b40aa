"""Every option of every group, in this process: it composes, builds and trains."""

import re
import traceback
from functools import partial

import pytest
import timm
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch.utils._python_dispatch import TorchDispatchMode

from distill import report
from distill.config import build, checks, read
from distill.config.overrides import CONF
from distill.config.resolvers import recommended_lr
from distill.data.sources.splits import Resident, Streamed
from distill.data.views.build import build_second_view, build_view
from distill.losses import LOSSES
from distill.training import auxiliary, cache, fit, teachers
from distill.training.module import Distiller
from distill.training.trainer import schedules
from distill.training.untrained import prepare

OBJECTIVES = sorted(path.stem for path in (CONF / "objective").glob("*.yaml"))
PAIRS = sorted(path.stem for path in (CONF / "pair").glob("*.yaml"))
PAIRED = {"r32x4": "resnet32x4", "r8x4": "resnet8x4", "r110": "resnet110", "r56": "resnet56",
          "r50": "resnet50", "r32": "resnet32", "r20": "resnet20", "wrn40_2": "wrn_40_2",
          "wrn40_1": "wrn_40_1", "wrn16_2": "wrn_16_2", "vgg13": "vgg13", "vgg8": "vgg8",
          "mobilenetv2": "mobilenetv2", "shufflev1": "shufflenet_v1",
          "shufflev2": "shufflenet_v2"}  # fmt: skip
QUICK = ("trainer.max_epochs=1", "trainer.limit_train_batches=2", "trainer.limit_val_batches=1",
         "teacher.fit.max_epochs=1", "trainer.accelerator=cpu", "logger=none", "callbacks=none",
         "baseline=false")  # fmt: skip


@pytest.fixture
def composed(tmp_path, cache):
    def make(*overrides, name="train"):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            paths = (f"paths.output_dir={tmp_path}", f"paths.cache={cache}")
            return compose(name, overrides=[*paths, *overrides])

    return make


@pytest.mark.parametrize(
    ("devices", "count"),
    [("1", 1), ("[0,1]", 2), ("'0,1'", 2), ("'3,'", 1), ("auto", 1), ("-1", 1), ("3", 3)],
)
def test_devices_are_counted_as_lightning_reads_them(composed, devices, count):
    cfg = composed(f"trainer.devices={devices}", "trainer.accelerator=cpu")
    assert read.processes(cfg) == count


class Waits(TorchDispatchMode):
    """Note what would make a processor wait for its GPU: asking for a value, or for a size."""

    asking = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
    indexing = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        counts = func in self.indexing and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if func in self.asking or counts:
            stack = traceback.format_stack(limit=12)
            if not any("_check_values" in line for line in stack):  # class counts are on the CPU
                self.found.append("".join(stack))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def waits(monkeypatch):
    """Return what forward and backward passes of a Distiller wait for."""
    watch = Waits()
    for name in ("training_step", "backward"):
        step = getattr(Distiller, name)

        def watched(*arguments, step=step, **named):
            with watch:
                return step(*arguments, **named)

        monkeypatch.setattr(Distiller, name, watched)
    return watch.found


def test_waiting_is_noticed():
    with Waits() as watch:
        torch.ones(2).sum().item()
        torch.ones(2)[torch.tensor([True, False])]
    assert len(watch.found) == 2


TOKEN = (  # a student that has a distillation token
    "student=timm", "student.name=deit_tiny_distilled_patch16_224",
    "student.args={img_size: 32, patch_size: 8, depth: 1, embed_dim: 24, num_heads: 2}",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*standardised logits")
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains_a_student_and_never_waits_for_its_device(
    composed, waits, objective
):
    student = TOKEN if objective == "deit" else ()
    cfg = composed(*QUICK, f"objective={objective}", "store=off", *student)
    data = build.build_data(cfg)
    built = build.build_objective(cfg, data)
    prepare(cfg, data)
    teacher = teachers.prepare_teacher(cfg, data) if built.needs_teacher else None
    student, trainer = fit.fit(cfg, data, teacher)
    assert trainer.global_step == 2
    assert waits == []
    for term in built.terms:
        assert torch.isfinite(trainer.callback_metrics[f"val/{term}"]), term
    assert all(p.isfinite().all() for p in student.student.parameters())


@pytest.mark.parametrize("objective", ["kd", "ctkd", "dist", "mlkd", "mlkd_two_views", "skd"])
def test_pictures_without_labels_teach_and_nothing_waits_for_its_device(
    composed, waits, tmp_path, objective
):
    from PIL import Image

    for shade in range(12):
        Image.new("L", (9, 9), 20 * shade).save(tmp_path / f"{shade}.png")
    given = ("store=off", f"data.unlabeled={tmp_path}", "data.unlabeled_share=0.25")
    cfg = composed(*QUICK, f"objective={objective}", *given)
    data = build.build_data(cfg)
    prepare(cfg, data)
    student, trainer = fit.fit(cfg, data, teachers.prepare_teacher(cfg, data))
    assert trainer.global_step == 2
    assert waits == []
    assert all(p.isfinite().all() for p in student.student.parameters())
    told = report.unlabeled_of(cfg, data, trainer)
    assert (told["images"], told["share"]) == (12, 0.25)
    assert told["views_shown"] == 2 * data.batch_size // 4


def test_every_loss_can_be_chosen_by_an_objective():
    named = {
        name
        for path in (CONF / "objective").glob("*.yaml")
        for name in re.findall(r"loss: (\w+)", path.read_text())
    }
    assert named == set(LOSSES)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_opens_with_the_command_that_runs_it(objective):
    first = (CONF / "objective" / f"{objective}.yaml").read_text().splitlines()[0]
    assert first.startswith(f"# distill objective={objective}")


def write_two_classes(folder):
    from PIL import Image

    for label, shade in (("dark", 40), ("light", 200)):
        (folder / "train" / label).mkdir(parents=True)
        for i in range(40):
            Image.new("RGB", (32, 32), (shade, shade, i)).save(
                folder / "train" / label / f"{i}.png"
            )


@pytest.mark.parametrize("objective", ["dkd", "nkd", "rld", "standardized_kd"])
def test_what_two_classes_leave_undefined_is_refused(composed, tmp_path, objective):
    write_two_classes(tmp_path / "photos")
    cfg = composed(*QUICK, "data=folder", f"data.root={tmp_path / 'photos'}", "data.batch_size=8",
                   "data.num_workers=0", f"objective={objective}")  # fmt: skip
    data = build.build_data(cfg)
    with pytest.raises(ValueError, match=r"at least 3 classes|two classes|K = 2|K=2"):
        prepare(cfg, data)


def test_an_ensemble_of_checkpoints_teaches(composed, tmp_path):
    from distill.models.build import build_model

    data = build.build_data(composed())
    paths = []
    for seed in range(2):
        torch.manual_seed(seed)
        cfg = composed(*QUICK)
        model = build_model(read.model_spec(cfg.student), build.data_shape(data), "student")
        from distill import save_student

        paths.append(str(save_student(model, tmp_path / f"teacher{seed}")))
    cfg = composed(*QUICK[:3], *QUICK[4:], "teacher=ensemble", f"teacher.checkpoints={paths}",
                   "teacher.combine=draw", "teacher.weights=[2,1]")  # fmt: skip
    prepare(cfg, data)
    teacher = teachers.prepare_teacher(cfg, data)
    assert teacher.model.weights == pytest.approx([2 / 3, 1 / 3])
    _, trainer = fit.fit(cfg, data, teacher)
    assert torch.isfinite(trainer.callback_metrics["val/agreement"])


def test_a_schedule_of_the_objective_moves_its_weight(composed):
    cfg = composed(*QUICK, "objective=dkd", "trainer.max_epochs=3")
    data = build.build_data(cfg)
    _, trainer = fit.fit(cfg, data, teachers.prepare_teacher(cfg, data))
    assert trainer.lightning_module.objective.annealed["terms.dkd.weight"] == 1.0
    first = composed(*QUICK, "objective=dkd", "trainer.max_epochs=1")
    _, trainer = fit.fit(first, data, teachers.prepare_teacher(first, data))
    assert trainer.lightning_module.objective.annealed["terms.dkd.weight"] == 0.5


@pytest.mark.parametrize("experiment", sorted(p.stem for p in (CONF / "experiment").glob("*.yaml")))
def test_every_experiment_composes(composed, experiment):
    assert composed(f"experiment={experiment}").task_name == "train"


@pytest.mark.parametrize("pair", PAIRS)
def test_every_pair_names_two_models_and_nothing_else(composed, pair):
    with torch.device("meta"):
        cfg = OmegaConf.merge(composed(), OmegaConf.load(CONF / "pair" / f"{pair}.yaml"))
        parts = {role: timm.create_model(cfg[role].name) for role in ("teacher", "student")}
    sizes = {role: sum(p.numel() for p in model.parameters()) for role, model in parts.items()}
    assert sizes["teacher"] > 2 * sizes["student"]
    names = [f"cifar_{PAIRED[part]}" for part in re.findall("|".join(PAIRED), pair)]
    assert names == [cfg.teacher.name, cfg.student.name]
    assert cfg.student.lr == recommended_lr(cfg.student.name)
    assert {**cfg.teacher, "name": ""} == {**composed().teacher, "name": ""}
    package, command, *_ = (CONF / "pair" / f"{pair}.yaml").read_text().splitlines()
    assert (package, command) == (
        "# @package _global_",
        f"# distill experiment=cifar100 pair={pair} data.root=CIFAR",
    )


def test_what_is_better_follows_from_the_metric(composed):
    for metric, mode in (
        ("val/top1", "max"),
        ("val/topk", "min"),  # the term of objective=smooth_topk, a loss
        ("val/nll", "min"),
        ("val/agreement", "max"),
        ("val/loss", "min"),
    ):
        cfg = composed(f"optimized_metric={metric}")
        assert cfg.callbacks.best.mode == mode


def test_what_decides_a_cached_model_is_in_its_key_and_nothing_else(composed, tmp_path):
    def key(role, *overrides):
        cfg = composed(*overrides)
        derived = auxiliary.supervised_config(cfg, role)
        return cache.fit_key(derived, cache.as_fitted(derived, build.build_data(cfg)))

    from distill import save_student
    from distill.models.build import build_model

    for role in ("teacher", "baseline"):
        for same in (
            "trainer.log_every_n_steps=7",
            "objective.temperature=2",
            "annealing=cosine",
            "topk=[1]",
            "report=false",
            "store=off",
            "tags=[a]",
            "baseline=false",
            "decision.confidence=0.5",
            "logger=none",
        ):
            assert key(role) == key(role, same), (role, same)
    assert key("teacher") == key("teacher", "seed=1") == key("teacher", "trainer.max_epochs=3")
    assert key("teacher") == key("teacher", "trainer.limit_val_batches=0.5")
    assert key("teacher") == key("teacher", "data.views_per_step=2")  # it sees one of the two
    assert key("baseline") == key("baseline", "data.strong_view.erase=0.5")
    twice = partial(key, "baseline", "data.views_per_step=2")
    assert twice() == key("baseline", "objective=mlkd_two_views") != twice("data.strong_view.pad=3")
    for role, other in (
        ("baseline", "seed=1"), ("baseline", "data.seed=1"), ("baseline", "optimizer.lr=0.1"),
        ("baseline", "+student.args.stem_width=8"), ("teacher", "teacher.fit.max_epochs=3"),
        ("teacher", "data.view.pad=2"), ("teacher", "data.split_seed=1"),
        ("teacher", "on_nan=skip"), ("baseline", "+nobody_knows=1"),
        ("baseline", "data.views_per_step=2"),
    ):  # fmt: skip
        assert key(role) != key(role, other), (role, other)

    cfg, path = composed(), tmp_path / "start"
    shape = build.data_shape(build.build_data(cfg))
    keys = []
    for seed in range(2):  # one path, two contents
        torch.manual_seed(seed)
        save_student(build_model(read.model_spec(cfg.student), shape, "student"), path)
        keys.append(key("baseline", f"student.checkpoint={path}"))
    assert keys[0] != keys[1]


def test_a_checkpoint_of_another_run_is_refused(composed, tmp_path):
    quick = (*QUICK[:3], QUICK[4], "logger=none", "teacher=none", "objective=supervised",
             "baseline=false", "callbacks=[checkpoints]")  # fmt: skip
    cfg = composed(*quick)
    data = build.build_data(cfg)
    fit.fit(cfg, data, None)
    path = tmp_path / "checkpoints" / "last.ckpt"
    for overrides, message in (
        ((), "nothing left to do"),
        (("trainer.max_epochs=2", "+student.args.stem_width=8"), "another student"),
        (
            ("trainer.max_epochs=2", "objective.temperature=2"),
            "trained at objective.temperature=1.0",
        ),
    ):
        other = composed(*quick, f"ckpt_path={path}", *overrides)
        with pytest.raises(ValueError, match=message):
            prepare(other, data)


def test_an_objective_on_two_views_asks_the_data_for_them_and_is_overruled(composed):
    assert composed("objective=mlkd").data.views_per_step == 1
    cfg = composed("objective=mlkd_two_views")
    assert cfg.data.views_per_step == 2
    assert build.build_data(cfg).views_per_step == 2
    assert auxiliary.supervised_config(cfg, "baseline").data.views_per_step == 2
    assert auxiliary.supervised_config(cfg, "teacher").data.views_per_step == 1
    assert (
        auxiliary.assistant_config(
            composed("objective=mlkd_two_views", "assistants=[{}]"), 1
        ).data.views_per_step
        == 2
    )
    alone = composed("objective=mlkd_two_views", "data.views_per_step=1")
    assert build.build_data(alone).views_per_step == 1
    with initialize_config_dir(str(CONF), version_base="1.3"):
        judged = compose("eval", overrides=["data=digits", "student.checkpoint=x"])
    assert judged.data.views_per_step == 1


@pytest.mark.parametrize("data", ["digits", "cifar10", "cifar100", "folder", "timm"])
def test_every_data_set_has_a_strong_view_that_is_taken(composed, data):
    cfg = composed(f"data={data}", *(() if data == "digits" else ("data.root=x",)))
    strong = read.plain(cfg.data.strong_view)
    assert strong
    split = Streamed(None, torch.zeros(2, dtype=torch.long), ["0", "1"])
    if data in ("digits", "cifar10", "cifar100"):
        split = Resident(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(2).long())
    channels = 1 if data == "digits" else 3
    options = read.plain(cfg.data.view)
    view = build_view(split, options, 32, channels)
    assert build_second_view(2, split, view, options, strong, 32, channels) != view


def test_a_students_checkpoint_names_the_architecture_of_the_run(composed, tmp_path):
    from distill import save_student

    model = timm.create_model("cifar_resnet8", num_classes=10, in_chans=1)
    save_student(model, tmp_path / "start")
    cfg = composed(f"student.checkpoint={tmp_path / 'start'}")
    cfg = build.with_architecture(cfg)
    assert cfg.student.name == "cifar_resnet8"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_command_that_an_objective_opens_with_is_accepted(composed, objective):
    line = (CONF / "objective" / f"{objective}.yaml").read_text().splitlines()[0]
    cfg = composed(*line.removeprefix("# distill ").split())
    data = build.build_data(cfg)
    built = build.build_objective(cfg, data)
    checks.check_objective(cfg, data, built)
    schedules(cfg, built)
