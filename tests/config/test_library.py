"""Every option of Lightning and timm works as they say, or is refused in one line.

`WRITE_DOCS=1 pytest tests/config/test_library.py -k page` writes `docs/library_options.md` anew.
"""

import csv
import io
import math
import os
from functools import partial
from itertools import pairwise

import pytest
import pytorch_lightning as pl
import timm
import torch
from pytorch_lightning import callbacks as lightning
from pytorch_lightning import loggers
from pytorch_lightning.loggers import CSVLogger
from timm.optim import get_optimizer_info, list_optimizers
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from distill.config import library
from distill.config.library import CALLBACKS, LOGGERS, SCHEDULES, TRAINER
from distill.objective.objective import Objective
from distill.training.callbacks.annealing import Annealing
from distill.training.callbacks.averages import UntilAveraged
from distill.training.module import Distiller, create_optimizer, create_schedule
from tests.commands import attempt
from tests.conftest import ROOT, Tiny, pairs

PAGE = ROOT / "docs" / "library_options.md"
UPDATES = 4  # in an epoch: 64 images in batches of 16
PURE = {"opt": "sgd", "lr": 0.1, "momentum": 0.0, "nesterov": False}


class Notes(pl.Callback):
    """The weights after each update, the rate before it, and what validation was of."""

    def __init__(self):
        self.weights, self.rates, self.validated, self.seen = [], [], [], []
        self.batches = self.sanity = 0

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.seen.append((torch.is_anomaly_enabled(), torch.backends.cudnn.benchmark,
                          torch.are_deterministic_algorithms_enabled()))  # fmt: skip

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step > len(self.weights):
            self.weights.append(flat(module.student))

    def on_validation_batch_end(self, trainer, module, *_):
        self.sanity += trainer.sanity_checking
        self.batches += not trainer.sanity_checking
        self.inference = torch.is_inference_mode_enabled()

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            self.validated.append(trainer.global_step)


def flat(model):
    return torch.cat([weight.detach().flatten() for weight in model.parameters()]).clone()


def fitted(tmp_path, *callbacks, optimizer=None, scheduler=None, loader=None, **flags):
    """Train for two epochs of four updates; return the trainer, the module and what was seen."""
    torch.manual_seed(0)
    module = Distiller(Tiny(), optimizer=optimizer or PURE, scheduler=scheduler)
    notes = Notes()
    options = {"max_epochs": 2, "enable_model_summary": False, "accelerator": "cpu",
               "enable_progress_bar": any(isinstance(c, lightning.ProgressBar) for c in callbacks),
               "enable_checkpointing": any(isinstance(c, lightning.Checkpoint) for c in callbacks),
               "log_every_n_steps": 1, "logger": CSVLogger(tmp_path, "", "")}  # fmt: skip
    averages = [c for c in callbacks if isinstance(c, lightning.WeightAveraging)]
    before = [UntilAveraged(averages)] if averages else []
    trainer = pl.Trainer(callbacks=[*before, *callbacks, notes], **{**options, **flags})
    trainer.fit(module, loader or pairs(), pairs(32))
    return trainer, module, notes


def logged(tmp_path, word):
    """The values of the columns of metrics.csv whose name has a word."""
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [float(v) for row in rows for k, v in row.items() if word in k and v]


# Callbacks


def averaged(tmp_path):
    average = lightning.EMAWeightAveraging(decay=0.5, update_starting_at_step=5)
    first = lightning.LambdaCallback(on_validation_batch_start=lambda t, m, *_: judged.append(
        flat(m.student)))  # fmt: skip
    judged = []
    _, module, notes = fitted(tmp_path, average, first, num_sanity_val_steps=0)
    assert torch.equal(judged[0], notes.weights[3])  # not the untrained ones
    expected = notes.weights[5]
    for weights in notes.weights[6:]:
        expected = 0.5 * expected + 0.5 * weights
    torch.testing.assert_close(flat(module.student), expected)


def averaged_alike(tmp_path):
    _, module, notes = fitted(tmp_path, lightning.WeightAveraging())
    torch.testing.assert_close(flat(module.student), torch.stack(notes.weights).mean(0))


def nothing_done(tmp_path):
    _, plain, _ = fitted(tmp_path)
    _, module, _ = fitted(tmp_path, pl.Callback())
    assert torch.equal(flat(plain.student), flat(module.student))


def device_stats(tmp_path):
    pytest.importorskip("psutil")
    fitted(tmp_path, lightning.DeviceStatsMonitor())
    assert logged(tmp_path, "DeviceStatsMonitor")


def never_better():
    return lightning.EarlyStopping("val/nll", min_delta=100.0, patience=1)


def stopped_early(tmp_path):
    trainer, *_ = fitted(tmp_path, never_better(), max_epochs=5)
    assert trainer.current_epoch == 2


def told_by_lambda(tmp_path):
    epochs = []
    told = lightning.LambdaCallback(on_train_epoch_end=lambda t, _: epochs.append(t.current_epoch))
    fitted(tmp_path, told)
    assert epochs == [0, 1]


def rates_logged(tmp_path):
    monitor = lightning.LearningRateMonitor("step")
    _, _, notes = fitted(tmp_path, monitor, scheduler={"sched": "cosine"})
    found = logged(tmp_path, "lr-")
    assert found[:: len(found) // len(notes.rates)] == pytest.approx(notes.rates)


def several_kept(tmp_path):
    both = [
        lightning.ModelCheckpoint(tmp_path / name, monitor=f"val/{name}", save_top_k=2)
        for name in ("nll", "brier")
    ]
    fitted(tmp_path, *both)
    assert [len(list((tmp_path / name).iterdir())) for name in ("nll", "brier")] == [2, 2]


def printed(tmp_path, callback, word, capsys, caplog):
    with caplog.at_level("INFO"):
        fitted(tmp_path, callback)
    assert word in "".join(capsys.readouterr()) + caplog.text


def throughput(tmp_path):
    fitted(tmp_path, lightning.ThroughputMonitor(batch_size_fn=lambda batch: len(batch[0])))
    assert max(logged(tmp_path, "train/samples") or logged(tmp_path, "samples")) == 2 * 64


def out_of_time(tmp_path):
    trainer, *_ = fitted(tmp_path, lightning.Timer({"seconds": 0}))
    assert trainer.global_step < 2 * UPDATES


CALLBACKS_WORK = {
    "Callback": nothing_done,
    "DeviceStatsMonitor": device_stats,
    "EMAWeightAveraging": averaged,
    "EarlyStopping": stopped_early,
    "LambdaCallback": told_by_lambda,
    "LearningRateMonitor": rates_logged,
    "ModelCheckpoint": several_kept,
    "ModelSummary": (lightning.ModelSummary, "student"),
    "RichModelSummary": (lightning.RichModelSummary, "student"),
    "RichProgressBar": (lightning.RichProgressBar, "Epoch"),
    "TQDMProgressBar": (lightning.TQDMProgressBar, "Epoch"),
    "ThroughputMonitor": throughput,
    "Timer": out_of_time,
    "WeightAveraging": averaged_alike,
}
REFUSED = {
    "BackboneFinetuning": lightning.BackboneFinetuning,
    "BaseFinetuning": lightning.BaseFinetuning,
    "BasePredictionWriter": lightning.BasePredictionWriter,
    "BatchSizeFinder": lightning.BatchSizeFinder,
    "Checkpoint": lightning.Checkpoint,
    "GradientAccumulationScheduler": partial(lightning.GradientAccumulationScheduler, {0: 3}),
    "LearningRateFinder": lightning.LearningRateFinder,
    "ModelPruning": partial(lightning.ModelPruning, "l1_unstructured"),
    "OnExceptionCheckpoint": partial(lightning.OnExceptionCheckpoint, "."),
    "ProgressBar": lightning.ProgressBar,
    "SpikeDetection": lightning.SpikeDetection,
    "StochasticWeightAveraging": partial(lightning.StochasticWeightAveraging, 0.01),
}


def test_every_callback_of_lightnings_has_a_verdict():
    assert CALLBACKS.keys() == set(lightning.__all__)
    assert CALLBACKS_WORK.keys() == {name for name, v in CALLBACKS.items() if v.works}
    assert REFUSED.keys() == {name for name, v in CALLBACKS.items() if not v.works}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLBACKS_WORK)
def test_a_callback_does_what_it_says(name, tmp_path, capsys, caplog):
    check = CALLBACKS_WORK[name]
    if isinstance(check, tuple):
        printed(tmp_path, check[0](), check[1], capsys, caplog)
    else:
        check(tmp_path)


@pytest.mark.parametrize("name", REFUSED)
def test_a_callback_is_refused_with_what_to_use(name):
    with pytest.raises(
        ValueError, match=f"callbacks.x: {name} is refused: .*(use|;|write)"
    ) as told:
        library.check_parts({"callbacks.x": REFUSED[name]()}, CALLBACKS)
    assert "\n" not in str(told.value)


def test_what_breaks_training_is_refused_from_python_too(tmp_path):
    with pytest.raises(ValueError, match=r"use trainer\.accumulate_grad_batches"):
        fitted(tmp_path, REFUSED["GradientAccumulationScheduler"]())


def test_a_callback_that_no_table_knows_is_warned_of(caplog):
    newer = type("Newer", (pl.Callback,), {"__module__": "pytorch_lightning.callbacks.newer"})
    own = type("Own", (pl.Callback,), {})
    library.check_parts({"callbacks.x": newer(), "callbacks.y": own()}, CALLBACKS)
    assert [r.getMessage() for r in caplog.records] == [
        "callbacks.x: nobody has tried Lightning's Newer here"
    ]


@pytest.mark.parametrize(
    ("options", "precision", "told"),
    [
        ({"update_starting_at_step": 8}, "32-true", "never begins in the 8 updates"),
        ({"update_every_n_steps": 0}, "32-true", "never begins"),
        ({"update_every_n_steps": 100}, "32-true", "holds the first update alone"),
        ({"update_starting_at_epoch": 1}, "32-true", "give update_starting_at_step=4"),
        ({}, "bf16-true", "use trainer.precision=bf16-mixed"),
    ],
)
def test_an_average_that_would_be_of_nothing_is_refused(options, precision, told):
    average = {"callbacks.ema": lightning.EMAWeightAveraging(**options)}
    with pytest.raises(ValueError, match=told):
        library.check_averages(average, precision, 2, 8)
    fine = {"callbacks.ema": lightning.EMAWeightAveraging(update_starting_at_step=7)}
    library.check_averages(fine, "64-true", 2, 8)


# The Trainer


def test_every_flag_of_the_trainer_has_a_verdict():
    assert TRAINER.keys() == set(library.trainer_flags())
    assert FLAGS_WORK.keys() == {name for name, v in TRAINER.items() if v.works}


def seen(tmp_path, position, **flags):
    _, _, notes = fitted(tmp_path, **flags)
    return all(values[position] for values in notes.seen)


def clipped(tmp_path, norm, **flags):
    """Whether no update of a rate of 1 is longer than its limit, and some would have been."""
    options = {**PURE, "lr": 1.0}
    (_, _, free), (_, _, held) = (fitted(tmp_path, optimizer=options, **f) for f in ({}, flags))
    longest = [
        max(float((b - a).norm(p=norm)) for a, b in pairwise(n.weights)) for n in (free, held)
    ]
    return longest[1] <= 0.01 + 1e-6 < longest[0]


def steps(tmp_path, *callbacks, **flags):
    return fitted(tmp_path, *callbacks, **flags)[0].global_step


def same_as_without(tmp_path, **flags):
    (_, one, _), (_, other, _) = fitted(tmp_path), fitted(tmp_path, **flags)
    return torch.equal(flat(one.student), flat(other.student))


FLAGS_WORK = {
    "accelerator": lambda t: fitted(t, accelerator="cpu")[1].device.type == "cpu",
    "strategy": "tests/training/test_ddp.py",
    "devices": "tests/training/test_ddp.py",
    "num_nodes": "tests/e2e/test_machines.py",
    "precision": "test_weights_are_the_same_to_the_bit_after_a_resume",
    "max_epochs": lambda t: steps(t, max_epochs=1) == UPDATES,
    "max_steps": "tests/training/test_long_runs.py",
    "val_check_interval": "tests/training/test_long_runs.py",
    "min_epochs": lambda t: steps(t, never_better(), max_epochs=5, min_epochs=3) == 3 * UPDATES,
    "min_steps": lambda t: steps(t, never_better(), max_epochs=5, min_steps=10) >= 10,
    "max_time": lambda t: steps(t, max_time={"seconds": 0}) < 2 * UPDATES,
    "limit_train_batches": lambda t: steps(t, limit_train_batches=1) == 2,
    "limit_val_batches": lambda t: fitted(t, limit_val_batches=1)[2].batches == 2,
    "check_val_every_n_epoch": lambda t: fitted(t, check_val_every_n_epoch=2)[2].validated == [8],
    "num_sanity_val_steps": lambda t: fitted(t, num_sanity_val_steps=1)[2].sanity == 1,
    "log_every_n_steps": lambda t: (
        fitted(t, lightning.LearningRateMonitor("step"), log_every_n_steps=4)
        and len(logged(t, "lr-SGD")) % 2 == 0),
    "accumulate_grad_batches": lambda t: steps(t, accumulate_grad_batches=3) == 2 * 2,
    "gradient_clip_val": lambda t: clipped(t, 2, gradient_clip_val=0.01),
    "gradient_clip_algorithm": lambda t: clipped(
        t, math.inf, gradient_clip_val=0.01, gradient_clip_algorithm="value"),
    "deterministic": lambda t: seen(t, 2, deterministic=True),
    "benchmark": lambda t: seen(t, 1, benchmark=True),
    "inference_mode": lambda t: not fitted(t, inference_mode=False)[2].inference,
    "profiler": lambda t: "run_training" in fitted(t, profiler="simple")[0].profiler.summary(),
    "detect_anomaly": lambda t: seen(t, 0, detect_anomaly=True),
    "sync_batchnorm": lambda t: same_as_without(t, sync_batchnorm=True),
    "enable_autolog_hparams": lambda t: same_as_without(t, enable_autolog_hparams=False),
}  # fmt: skip


@pytest.fixture
def restored():
    benchmark = torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = benchmark


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("name", FLAGS_WORK)
def test_a_flag_of_the_trainer_does_what_it_says(name, tmp_path):
    check = FLAGS_WORK[name]
    if not isinstance(check, str):
        assert check(tmp_path)
    elif check.startswith("tests/"):
        assert (ROOT / check).is_file()
    else:
        assert check in globals()


def test_flags_that_are_refused_say_what_to_use(tmp_path):
    for name in (name for name, verdict in TRAINER.items() if not verdict.works):
        with pytest.raises(ValueError, match=rf"trainer\.{name} is the run's own to set: .{{12}}"):
            library.check_trainer(["max_epochs", name])


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("+trainer.plugins=[]", "trainer.plugins is the run's own to set"),
        ("+callbacks.f._target_=pytorch_lightning.callbacks.BatchSizeFinder", "data.batch_size"),
        ("optimizer.opt=adahessian", "needs second derivatives"),
        ("callbacks=[checkpoints,ema] +callbacks.ema.update_starting_at_step=9999", "never begins"),
        ("callbacks.best.monitor=val/top1 +callbacks.best.every_n_train_steps=3", "end of epochs"),
        ("+logger.x._target_=pytorch_lightning.loggers.CSVLogger +logger.x.save_dir=run "
         "+logger.x.name='' +logger.x.version=''", "would write over the run's metrics.csv"),
    ],
)  # fmt: skip
def test_the_command_refuses_in_one_line_before_anything_is_trained(line, told, tmp_path):
    ended = attempt(f"distill hydra.run.dir=run paths.cache=cache {line}", tmp_path)
    assert ended.code == 2, ended.errors
    assert told in ended.errors.splitlines()[-1]


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "16-true"])
@pytest.mark.filterwarnings("ignore")
def test_weights_are_the_same_to_the_bit_after_a_resume(precision, tmp_path):
    whole = fitted(tmp_path, precision=precision, optimizer={"opt": "sgd", "lr": 0.1})[1]
    torch.manual_seed(0)
    path, options = tmp_path / "x.ckpt", {"optimizer": {"opt": "sgd", "lr": 0.1}}
    trainer, *_ = fitted(tmp_path, precision=precision, max_epochs=1, **options)
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)["state_dict"]
    resumed = Distiller(Tiny(), **options)
    seen = {}
    look = lightning.LambdaCallback(on_train_start=lambda t, m: seen.update(
        {k: v.clone() for k, v in m.student.state_dict(prefix="student.").items()}))  # fmt: skip
    trainer = pl.Trainer(max_epochs=2, precision=precision, accelerator="cpu", callbacks=[look],
                         logger=False, enable_checkpointing=False, enable_model_summary=False,
                         enable_progress_bar=False)  # fmt: skip
    torch.manual_seed(1)
    trainer.fit(resumed, pairs(), ckpt_path=path, weights_only=True)
    assert all(torch.equal(seen[key], saved[key]) for key in seen)
    assert {v.dtype for v in seen.values()} == {v.dtype for v in saved.values()}
    assert flat(whole.student).dtype == flat(resumed.student).dtype


# Loggers


def test_every_logger_of_lightnings_has_a_verdict():
    assert LOGGERS.keys() == set(loggers.__all__)
    with pytest.raises(ValueError, match=r"logger\.x: Logger is refused"):
        library.check_parts({"logger.x": type("Logger", (), {
            "__module__": "pytorch_lightning.loggers.logger"})()}, LOGGERS)  # fmt: skip


# Optimisers

ELSEWHERE = ("bnb", "fused")  # on CUDA alone
NAMES = [*sorted(library.OPTIMIZERS), "lookahead_adamw", "lookahead_muon"]


def test_timms_optimisers_are_known():
    assert set(list_optimizers()) == library.OPTIMIZERS


def learner(name):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)
    )
    return model, create_optimizer(model, {"opt": name, "lr": 1e-2, "weight_decay": 0.02})


def learn(model, optimizer, first, last):
    images = torch.rand(6, 8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for k in range(first, last):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[k]), torch.arange(8) % 4).backward()
        optimizer.step()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_an_optimiser_trains_and_goes_on_as_if_never_interrupted(name):
    if name.startswith(ELSEWHERE) or get_optimizer_info(name.split("_")[-1]).second_order:
        with pytest.raises(ValueError, match=r"optimizer.*(refused|CUDA)"):
            learner(name)
        return
    model, optimizer = learner(name)
    before, kept = flat(model), io.BytesIO()
    learn(model, optimizer, 0, 3)
    assert not torch.equal(before, flat(model))
    torch.save((model.state_dict(), optimizer.state_dict()), kept)
    learn(model, optimizer, 3, 6)
    kept.seek(0)
    torch.rand(1)  # what is drawn meanwhile
    resumed, other = learner(name)
    for part, state in zip((resumed, other), torch.load(kept, weights_only=True), strict=True):
        part.load_state_dict(state)
    learn(resumed, other, 3, 6)
    assert torch.equal(flat(model), flat(resumed))
    assert flat(model).isfinite().all()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"opt": "bnb_adamw"}, "timm would drop 'bnb' and train with adamw; give adamw"),
        ({"opt": "sgd_lookahead_adam"}, "timm would drop 'sgd_lookahead'"),
        ({"opt": "sgd", "betas": [0.9, 0.99]}, "betas: sgd has none"),
        ({"opt": "momentum", "eps": 1e-3}, "eps: momentum has none"),
        ({"opt": "adamw", "momentum": 0.5}, "momentum: adamw has none"),
        ({"opt": "adamw", "layer_decay_min_scale": 0.1}, "needs optimizer.layer_decay"),
        ({"opt": "lookahead_adahessian"}, "second derivatives"),
        ({"opt": "lbfgs"}, "several times; use|several times, which is there once; use"),
        ({"opt": "sam"}, "steps twice"),
        ({"opt": "schedule_free"}, "weights for training and others for evaluation"),
        ({"opt": "adamm"}, "did you mean adam"),
    ],
)
def test_an_optimiser_that_would_not_be_the_one_asked_for_is_refused(options, told):
    with pytest.raises(ValueError, match=told):
        create_optimizer(Tiny(), {"lr": 1e-2, **options})


@pytest.mark.parametrize(
    ("attributes", "told"),
    [
        ({"first_step": None}, "steps twice"),
        ({"train": lambda self: None}, "others for evaluation"),
        ({"step": lambda self, closure: None}, "several times"),
        ({"is_second_order": True}, "second derivatives"),
    ],
)
def test_an_optimiser_of_any_origin_that_needs_more_than_a_step_is_refused(attributes, told):
    strange = type("Strange", (torch.optim.SGD,), attributes)([nn.Parameter(torch.zeros(1))], 0.1)
    with pytest.raises(ValueError, match=told):
        library.check_steps("strange", strange)


def test_rates_by_layer_need_a_schedule_that_applies_them():
    options = {"opt": "adamw", "layer_decay": 0.5}
    with pytest.raises(ValueError, match=r"scheduler\.sched=constant"):
        Distiller(Tiny(), optimizer=options)
    Distiller(Tiny(), optimizer=options, scheduler={"sched": "constant"})


@pytest.mark.filterwarnings("ignore")
def test_lookaheads_slow_weights_are_what_an_epoch_ends_with(tmp_path):
    options = {**PURE, "opt": "lookahead_sgd"}
    trainer, module, _ = fitted(tmp_path, optimizer=options, max_epochs=1)
    _, _, fast = fitted(tmp_path, optimizer=PURE, max_epochs=1)
    # Four updates are fewer than the six that it waits for: the slow weights begin at the epoch's
    # end, where the fast ones are.
    torch.testing.assert_close(flat(module.student), fast.weights[-1])
    state = trainer.optimizers[0].state_dict()["state"]
    assert all("lookahead_slow_buff" in one for one in state.values())


# Schedules

LR, EPOCHS, PER = 0.1, 20, 7


def rates(options, epochs=EPOCHS, updates=PER, lr=LR):
    """The rate of each update of training."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr)
    schedule = create_schedule(optimizer, options, epochs, updates)
    found = []
    for update in range(epochs * updates):
        schedule.step_update(update)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def cosine(x):
    return (1 + math.cos(math.pi * x)) / 2


FORMULAS = {  # of the share of training that is over, and epochs
    "cosine": ({"min_lr": 0.01}, lambda x, t: 0.01 + 0.09 * cosine(x)),
    "tanh": ({"min_lr": 0.01}, lambda x, t: 0.01 + 0.045 * (1 - math.tanh(-7 * (1 - x) + 3 * x))),
    "poly": ({"min_lr": 0.01, "decay_rate": 2.0}, lambda x, t: 0.01 + 0.09 * (1 - x) ** 2),
    "step": ({"decay_epochs": 6, "decay_rate": 0.5}, lambda x, t: 0.1 * 0.5 ** (t // 6)),
    "multistep": ({"decay_milestones": [6, 12, 16], "decay_rate": 0.2},
                  lambda x, t: 0.1 * 0.2 ** sum(m <= t for m in (6, 12, 16))),
    "constant": ({}, lambda x, t: 0.1),
    "wsd": ({"min_lr": 0.01, "decay_epochs": 5},
            lambda x, t: 0.01 + 0.09 * (1 - math.sqrt(max(t - 15, 0) / 5))),
    "rsqrt": ({"stable_timescale": 4, "decay_epochs": 5},
              lambda x, t: 0.1 * math.sqrt(4 / (4 + t)) * (1 - max(t - 15, 0) / 5)),
}  # fmt: skip


def test_every_schedule_has_its_formula():
    assert FORMULAS.keys() | {"none"} == SCHEDULES.keys()


@pytest.mark.parametrize("name", FORMULAS)
def test_a_schedule_is_its_formula(name):
    options, formula = FORMULAS[name]
    expected = [formula(k / (EPOCHS * PER), k / PER) for k in range(EPOCHS * PER)]
    assert rates({"sched": name, **options}) == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_the_literatures_milestones_are_reached_to_the_update():
    """Wide ResNets on CIFAR: 200 epochs of 391 updates, a fifth at 60, 120 and 160."""
    options = {"sched": "multistep", "decay_milestones": [60, 120, 160], "decay_rate": 0.2}
    found = rates(options, 200, 391)
    for k, milestone in enumerate((60, 120, 160)):
        first = milestone * 391
        assert found[first - 1 : first + 1] == pytest.approx([0.1 * 0.2**k, 0.1 * 0.2 ** (k + 1)])
    assert found[-1] == pytest.approx(0.1 * 0.2**3)


@pytest.mark.parametrize("name", FORMULAS)
def test_a_warm_up_rises_in_a_straight_line(name):
    found = rates({"sched": name, **FORMULAS[name][0], "warmup_epochs": 3, "warmup_lr": 0.001})
    slopes = {round(b - a, 9) for a, b in pairwise(found[: 3 * PER])}
    assert found[0] == pytest.approx(0.001)
    assert len(slopes) == 1
    assert slopes.pop() > 0


def test_cycles_a_cooldown_and_a_warm_up_before_it_all_end_with_training():
    twice = rates({"sched": "cosine", "cycle_limit": 2, "cycle_decay": 0.5})
    half = EPOCHS * PER // 2
    assert twice[half] == pytest.approx(LR / 2)
    assert twice[-1] < 0.001 < twice[half + 1]
    cooled = rates({"sched": "cosine", "cooldown_epochs": 5, "min_lr": 0.02})
    assert cooled[-5 * PER :] == pytest.approx([0.02] * 5 * PER)
    assert cooled[-5 * PER - 1] > 0.02
    prefixed = rates({"sched": "cosine", "warmup_epochs": 4, "warmup_prefix": True})
    assert prefixed[4 * PER] == pytest.approx(LR)
    assert prefixed[-1] < 0.001
    growing = {"sched": "cosine", "cycle_limit": 2, "cycle_mul": 3.0, "cycle_decay": 1.0}
    assert rates(growing)[EPOCHS * PER // 4] == pytest.approx(LR)


def test_noise_is_a_function_of_the_update():
    options = {"sched": "cosine", "noise": [0.5, 1.0], "noise_pct": 0.3}
    noisy, calm = rates(options), rates({"sched": "cosine"})
    half = EPOCHS * PER // 2
    assert noisy == rates(options)
    assert noisy[:half] == calm[:half]
    assert noisy[half:-1] != calm[half:-1]
    assert all(abs(a - b) <= 0.3 * b for a, b in zip(noisy, calm, strict=True))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"sched": "plateau"}, "use multistep, step or cosine"),
        ({"sched": "cosine", "step_on_epochs": True}, "the run's own to set"),
        ({"sched": "cosine", "noise": 0.5, "noise_pct": 0}, "noise_pct must be above 0"),
        ({"sched": "multistep", "decay_milestones": [120, 60]}, "must be rising epochs"),
        ({"sched": "cosine", "cooldown_epochs": 20}, "leave none of 20 epochs"),
        ({"sched": "cosin"}, "Unknown scheduler"),
    ],
)
def test_a_schedule_that_could_not_be_followed_is_refused(options, told):
    with pytest.raises(ValueError, match=told):
        rates(options)


def test_options_that_a_schedule_does_not_read_are_named():
    assert library.unread({"sched": "cosine", "min_lr": 0.0, "warmup_lr": 1e-5}, 8) == []
    assert library.unread({"sched": "step", "decay_epochs": 3, "min_lr": 1e-4}, 8) == [
        "scheduler.min_lr changes nothing: sched=step does not read it"
    ]
    assert "first step is at epoch 90 of 8" in library.unread({"sched": "multistep"}, 8)[0]
    assert library.unread({"sched": "none", "warmup_lr": 1e-5}, 8) == []


def test_no_schedule_by_timms_name_is_a_constant_rate(tmp_path):
    _, _, notes = fitted(tmp_path, scheduler={"sched": "none"})
    assert set(notes.rates) == {0.1}


# The length of training


class Stream(IterableDataset):
    """64 images, as who does not know how many there are, or says so wrongly."""

    def __iter__(self):
        return iter(pairs().dataset)


class Liar(Stream):
    def __len__(self):
        return 128


def positions(tmp_path, loader, **flags):
    """The rates of training, and the temperatures, under a linear schedule of each."""
    torch.manual_seed(0)
    objective = Objective(
        {"ce": "cross_entropy", "kl": "kl_divergence"}, temperature=8.0, alpha=0.5
    )
    module = Distiller(Tiny(), Tiny(), objective, optimizer=PURE,
                       scheduler={"sched": "poly", "decay_rate": 1.0})  # fmt: skip
    notes, seen = Notes(), []
    note = lightning.LambdaCallback(
        on_before_optimizer_step=lambda t, m, o: seen.append(m.objective.temperature)
    )
    options = {"max_epochs": 3, "logger": False, "accelerator": "cpu", **flags}
    trainer = pl.Trainer(callbacks=[notes, note, Annealing("linear", end=1.0, unit="step")],
                         enable_checkpointing=False, enable_progress_bar=False,
                         enable_model_summary=False, **options)  # fmt: skip
    trainer.fit(module, loader)
    return notes.rates, seen, module, trainer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("data", [Stream, Liar])
def test_a_length_that_is_unknown_or_wrong_is_learnt_in_the_first_epoch(data, tmp_path, caplog):
    told, temperatures, _module, trainer = positions(tmp_path, DataLoader(data(), batch_size=16))
    expected = [0.1 * (1 - k / 12) for k in range(12)]
    assert told[UPDATES:] == pytest.approx(expected[UPDATES:])
    assert temperatures[UPDATES:] == pytest.approx([8 - 7 * k / 11 for k in range(UPDATES, 12)])
    if data is Stream:
        assert told[:UPDATES] == [0.1] * UPDATES
        assert set(temperatures[:UPDATES]) == {8.0}
    words = "has no length" if data is Stream else "gives 8 updates an epoch, and this one had 4"
    assert words in caplog.text
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert saved["distill"]["counted_updates"] == UPDATES


@pytest.mark.filterwarnings("ignore")
def test_a_limit_says_how_long_a_stream_is(tmp_path, caplog):
    stream = DataLoader(Stream(), batch_size=16)
    told, *_ = positions(tmp_path, stream, limit_train_batches=2)
    assert told == pytest.approx([0.1 * (1 - k / 6) for k in range(6)])
    assert "no length" not in caplog.text


@pytest.mark.filterwarnings("ignore")
def test_steps_that_are_limited_are_what_schedules_end_with(tmp_path):
    told, *_ = positions(tmp_path, pairs(), max_epochs=-1, max_steps=6)
    assert told == pytest.approx([0.1 * (1 - k / 6) for k in range(6)])


@pytest.mark.filterwarnings("ignore")
def test_training_without_an_end_has_no_schedule(tmp_path):
    with pytest.raises(ValueError, match="training without an end has no schedule"):
        positions(tmp_path, pairs(), max_epochs=-1)


@pytest.mark.filterwarnings("ignore")
def test_schedules_go_by_the_updates_that_accumulation_leaves(tmp_path):
    data = TensorDataset(torch.rand(80, 1, 8, 8), torch.arange(80) % 4)
    told, *_ = positions(tmp_path, DataLoader(data, batch_size=16), accumulate_grad_batches=2)
    assert told == pytest.approx([0.1 * (1 - k / 9) for k in range(9)])  # 5 batches: 3 updates


# The page


def table(*rows):
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def verdicts(what, found, tested):
    rows = []
    for name, verdict in sorted(found.items(), key=lambda item: item[0].lower()):
        where = tested(name)
        by = where if isinstance(where, str) and "/" in where else f"`{where}`"
        told = f"works: {verdict.note} | {by}" if verdict.works else f"refused: {verdict.note} | –"
        rows.append((f"`{name}`", *told.split(" | ")))
    return table((what, "verdict", "tested by"), *rows)


def optimizers():
    def row(name):
        info = get_optimizer_info(name)
        if info.second_order:
            return f"`{name}`", f"refused: {library.SECOND_ORDER}"
        if name.startswith(ELSEWHERE):
            package = str(info.opt_class).partition(".")[0]
            return (
                f"`{name}`",
                f"with CUDA and `{package}`, not tested; refused in one line elsewhere",
            )
        return f"`{name}`", f"works: {info.description}"

    refused = ((f"`{n}`", f"refused: {why}") for n, why in library.NO_OPTIMIZERS.items()
               if n not in library.OPTIMIZERS)  # fmt: skip
    return table(("`optimizer.opt`", "verdict"), *map(row, sorted(library.OPTIMIZERS)), *refused)


def schedules():
    rows = [(f"`{n}`", s.formula, ", ".join(f"`{key}`" for key in sorted(s.reads - library.ALWAYS)))
            for n, s in SCHEDULES.items()]  # fmt: skip
    refused = [(f"`{name}`", f"refused: {why}", "–") for name, why in library.NO_SCHEDULES.items()]
    return table(("`scheduler.sched`", "the rate at t of T", "reads"), *rows, *refused)


def flag_test(name):
    check = FLAGS_WORK.get(name)
    return (
        check if isinstance(check, str) else f"test_a_flag_of_the_trainer_does_what_it_says[{name}]"
    )


def page():
    return f"""# Options of Lightning and timm

What `+callbacks.NAME`, `trainer.FLAG`, `logger`, `optimizer.opt` and `scheduler.sched` accept works
as its own documentation says, or is refused in one line before anything is trained. This page is
of Lightning {pl.__version__} and timm {timm.__version__}; what a later version brings is warned of.
`tests/config/test_library.py` makes it, compares it, and tries what works;
`WRITE_DOCS=1 pytest tests/config/test_library.py -k page` writes it anew.

## Callbacks

{verdicts("callback", CALLBACKS, "test_a_callback_does_what_it_says[{}]".format)}

## Flags of the Trainer

{verdicts("`trainer.…`", TRAINER, flag_test)}

## Loggers

{verdicts("logger", LOGGERS, lambda _: "tests/training/callbacks/test_loggers.py")}

## Optimisers

`test_an_optimiser_trains_and_goes_on_as_if_never_interrupted` runs each that works.
`lookahead_NAME` wraps any of them in Lookahead; its slow weights are what an epoch ends with, as in
timm's own training. Any other prefix, which timm would drop, is refused, as are `eps`, `betas` and
`momentum` for an optimiser without them.

{optimizers()}

## Schedules

Options are in epochs, and the rate follows the update. Each reads `num_epochs`, `warmup_epochs`,
`warmup_lr`, `warmup_prefix` and `noise…` besides; what it does not read is named in one line. All
of a schedule, with its cycles, its cooldown and a warm-up before it, takes as long as training.
Each is compared with its formula by `test_a_schedule_is_its_formula`.

{schedules()}
"""


def test_the_page_says_what_the_tables_do():
    if os.environ.get("WRITE_DOCS"):
        PAGE.write_text(page())
    if f"Lightning {pl.__version__} and timm {timm.__version__};" not in PAGE.read_text():
        pytest.skip("the page is of other versions")
    assert PAGE.read_text() == page()
