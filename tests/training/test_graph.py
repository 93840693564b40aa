"""A step as one function of static buffers: called on a CPU, it gives the eager student.

On a CPU the very function that a GPU captures is called instead, on the same buffers.
"""

import pytest
import torch
from hydra import compose, initialize_config_dir

from distill.cli import CONF
from distill.config import build
from distill.training import fit, teachers

QUICK = ("trainer.max_epochs=2", "trainer.limit_train_batches=5", "teacher.fit.max_epochs=1",
         "trainer.accelerator=cpu", "logger=none", "callbacks=none", "baseline=false",
         "report=false", "data.batch_size=30")  # fmt: skip


@pytest.fixture
def fitted(tmp_path, cache):
    """Train, and return the student's weights, what was logged, and how many steps were graphs."""

    def trained(*overrides, name="run"):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            paths = (f"paths.output_dir={tmp_path / name}", f"paths.cache={cache}",
                     f"store.path={tmp_path / 'answers'}")  # fmt: skip
            cfg = compose("train", overrides=[*paths, *QUICK, *overrides])
        data = build.build_data(cfg)
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
    "no teacher": ("teacher=none", "objective=supervised"),
    "annealed temperature and weights": ("store=off", "annealing=linear", "annealing.end=4"),
    "annealed α, which reaches 1": ("store=off", "annealing=linear", "annealing.value=alpha",
                                    "annealing.end=1", "trainer.max_epochs=3"),
    "a schedule of rates and clipping": ("store=off", "trainer.gradient_clip_val=0.5",
                                         "scheduler.warmup_epochs=1"),
    "views that mix": ("store=off", "data.view={pad: 1, mixup: 0.4, cutmix: 1}"),
    "momentum": ("store=off", "optimizer.opt=sgd", "optimizer.lr=0.05"),
    "learned temperature": ("store=off", "objective=ctkd"),
    "feature maps": ("store=off", "objective=hint"),
    "bf16": ("store=off", "trainer.precision=bf16-mixed"),
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
