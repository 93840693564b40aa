"""Training by steps: where it ends, when it validates, and that a killed run goes on exactly."""

import csv

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger

from distill import Annealing, Distiller, Objective
from distill.data import DataModule
from distill.data.sources.splits import Resident, Source
from distill.training import horizon, resume
from distill.training.callbacks import checkpoints
from distill.training.callbacks.checkpoints import LatestCheckpoint
from distill.training.callbacks.continuity import Continuity
from distill.training.callbacks.last_step import LastStep, last_step
from distill.training.callbacks.progress import EpochLines
from distill.training.trainer import check_trainer, check_validation, updates_of, with_length
from distill.utils.run_folder import by_epoch, read_history

EACH = 6  # batches in an epoch
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory")


class Killed(RuntimeError):
    """The process is gone."""


class Kill(pl.Callback):
    """Stop where told, and note when a checkpoint was written and how far the rate had come."""

    def __init__(self, at=None):
        self.at, self.rates = at, []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.at:
            raise Killed
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


class Saved(LatestCheckpoint):
    """The latest checkpoint, and the steps at which one was written."""

    def __init__(self, *given, **options):
        super().__init__(*given, **options)
        self.steps = []

    def _write(self, trainer):
        self.steps.append(trainer.global_step)
        super()._write(trainer)


def made_data():
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (80, 1, 8, 8), generator=generator).to(torch.uint8)
    split = Resident(images, (torch.arange(80) % 8).clamp(max=3))
    parts = [split.subset(torch.arange(a, b)) for a, b in ((0, 48), (48, 64), (64, 80))]
    return DataModule(Source("random", list("abcd"), 1, *parts), {"pad": 1}, batch_size=8)


def fit(folder, tiny, kill=None, resumed=False, steps=None, patience=None, latest=None, **flags):
    """Train as a run does, and return what it left."""
    torch.manual_seed(0)
    teacher, student = tiny(width=16), tiny()
    student.body[3] = torch.nn.Identity()  # dropout draws from torch's own generator
    terms = {"ce": "cross_entropy", "kl": "kl_divergence"}
    module = Distiller(
        student, teacher, Objective(terms, 4.0, 0.5), topk=(1,),
        optimizer={"opt": "adamw", "lr": 0.01}, scheduler={"sched": "cosine"},
    )  # fmt: skip
    killer = Kill(kill)
    best = ModelCheckpoint(folder, "best", monitor="val/nll", enable_version_counter=False)
    last = Saved(folder, **(latest or {}))
    history = CSVLogger(folder, name="", version="")
    callbacks = [Annealing("cosine", end=1.0, unit="step"), killer, Continuity(history), best, last]
    if patience is not None:
        callbacks.insert(0, EarlyStopping("val/nll", patience=patience, min_delta=0.02))
    if steps is not None:
        callbacks.insert(0, LastStep(steps))
    trainer = pl.Trainer(
        accelerator="cpu", logger=history, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, default_root_dir=folder, callbacks=callbacks,
        **{"max_epochs": 3, **flags},
    )  # fmt: skip
    path = folder / "last.ckpt" if resumed else None
    trainer.fit(module, datamodule=made_data(), ckpt_path=path, weights_only=True)
    return trainer, module.student.state_dict(), best, last, killer


def rows(folder, *names):
    history = read_history(folder / "metrics.csv")
    return [tuple(row.get(name) for name in names) for row in history if row.get(names[-1])]


BY_STEPS = {"check_val_every_n_epoch": None, "val_check_interval": 4}


@pytest.mark.parametrize(
    ("steps", "validated"), [(14, [4, 8, 12, 14]), (12, [4, 8, 12]), (5, [4, 5])]
)
def test_it_ends_after_so_many_steps_and_validates_the_last(tiny, tmp_path, steps, validated):
    trainer, _, best, last, killer = fit(tmp_path, tiny, steps=steps, **BY_STEPS)
    assert trainer.global_step == steps
    known = rows(tmp_path, "step", "val/nll")
    assert [int(step) + 1 for step, _ in known] == validated
    assert last.steps == sorted({*validated, *range(EACH, steps, EACH), steps})
    assert float(best.best_model_score) == pytest.approx(min(float(v) for _, v in known))
    # the cosine ends there: half-way it is at half of the rate
    assert killer.rates[0] == 0.01
    assert killer.rates[steps // 2] == pytest.approx(0.005, abs=0.002)
    assert len(killer.rates) == steps


def test_schedules_that_go_by_epochs_know_how_many_are_begun(tiny, tmp_path):
    trainer, *_ = fit(tmp_path, tiny, steps=8, max_epochs=3)
    assert horizon.total_updates(trainer) == 8
    assert horizon.position_of(trainer, "epoch")[1] == horizon.epochs_of(trainer) == 2


@pytest.mark.parametrize(("accumulate", "interval"), [(1, 4), (1, 3), (2, 4), (2, 3)])
def test_a_run_that_is_killed_anywhere_goes_on_to_the_same(tiny, tmp_path, accumulate, interval):
    options = {**BY_STEPS, "val_check_interval": interval, "steps": 15 // accumulate,
               "accumulate_grad_batches": accumulate, "max_epochs": 9}  # fmt: skip
    latest = {"every_n_train_steps": 2}
    _, student, best, *_ = fit(tmp_path / "whole", tiny, latest=latest, **options)
    for kill in range(3, 15 // accumulate, 2):
        folder = tmp_path / f"killed-{kill}"
        with pytest.raises(Killed):
            fit(folder, tiny, kill, latest=latest, **options)
        _, other, again, *_ = fit(folder, tiny, resumed=True, latest=latest, **options)
        assert all(torch.equal(value, student[key]) for key, value in other.items())
        text = [(place / "metrics.csv").read_text() for place in (folder, tmp_path / "whole")]
        assert text[0] == text[1], kill
        assert again.best_model_score == best.best_model_score


def test_an_early_stop_follows_each_validation_and_a_resumed_one_too(tiny, tmp_path):
    options = {**BY_STEPS, "val_check_interval": 2, "patience": 1, "max_epochs": 20}
    whole, student, *_ = fit(tmp_path / "whole", tiny, **options)
    assert whole.global_step < 20 * EACH
    assert whole.global_step % 2 == 0
    folder = tmp_path / "killed"
    with pytest.raises(Killed):
        fit(folder, tiny, kill=whole.global_step - 1, **options)
    again, other, *_ = fit(folder, tiny, resumed=True, **options)
    assert again.global_step == whole.global_step
    assert all(torch.equal(value, student[key]) for key, value in other.items())


@pytest.fixture
def minutes(monkeypatch):
    """A clock that goes on by half a minute each time that it is read."""
    now = iter(range(0, 10**6, 30))
    monkeypatch.setattr(checkpoints, "monotonic", lambda: next(now))


@pytest.mark.usefixtures("minutes")
def test_checkpoints_by_minutes(tiny, tmp_path):
    *_, last, _ = fit(tmp_path, tiny, latest={"every_minutes": 1.0})
    # read once a step and once at each checkpoint: a minute has passed with every second step
    assert last.steps == [2, 4, 6, 8, 10, 12, 14, 16, 18]


@pytest.mark.usefixtures("minutes")
@pytest.mark.parametrize("kill", [3, 5, 9, 13])
def test_a_kill_between_two_of_them(tiny, tmp_path, kill):
    options = {"latest": {"every_minutes": 1.0}, "num_sanity_val_steps": 0}
    _, student, *_ = fit(tmp_path / "whole", tiny, **options)
    with pytest.raises(Killed):
        fit(tmp_path / "killed", tiny, kill, **options)
    content = torch.load(tmp_path / "killed" / "last.ckpt", weights_only=False)
    assert 0 < content["global_step"] < kill
    _, other, *_ = fit(tmp_path / "killed", tiny, resumed=True, **options)
    assert all(torch.equal(value, student[key]) for key, value in other.items())
    text = [(tmp_path / name / "metrics.csv").read_text() for name in ("whole", "killed")]
    assert text[0] == text[1]


def test_minutes_are_above_zero(tmp_path):
    with pytest.raises(ValueError, match="every_minutes must be above 0, got 0"):
        LatestCheckpoint(tmp_path, every_minutes=0)
    with pytest.raises(ValueError, match="every_n_train_steps must be at least 1, got 0"):
        LatestCheckpoint(tmp_path, every_n_train_steps=0)


def test_progress_is_told_within_an_epoch_and_says_how_many_there_will_be(tiny, tmp_path, caplog):
    caplog.set_level("INFO", "distill")
    module = Distiller(tiny(), num_classes=4, topk=(1,))
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[LastStep(8), EpochLines()],
        max_epochs=9, use_distributed_sampler=False, **BY_STEPS,
    )  # fmt: skip
    trainer.fit(module, datamodule=made_data())
    told = [line.split("  ")[1] for line in caplog.messages if line.startswith("  ")]
    assert told == ["step 4", "epoch 1/2", "epoch 2/2"]


def test_time_that_is_up_is_validated_and_its_means_are_those_of_its_epoch(tiny, tmp_path, caplog):
    caplog.set_level("INFO", "distill")

    class Up(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == EACH + 2  # as Lightning's Timer does

    module = Distiller(tiny(), num_classes=4, topk=(1,), optimizer={"opt": "sgd", "lr": 0.5})
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[Up(), EpochLines()], max_epochs=9,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=made_data())
    first, second = (line.split("train/loss ")[1].split()[0] for line in caplog.messages
                     if "epoch" in line)  # fmt: skip
    assert first != second
    assert trainer.global_step == EACH + 2


def test_the_last_step_is_ones_own_or_the_trainers():
    given = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    assert last_step(pl.Trainer(**given)) is None
    assert last_step(pl.Trainer(max_steps=7, **given)) == 7
    assert last_step(pl.Trainer(callbacks=[LastStep(5)], **given)) == 5


# What a configuration says


def configured(**trainer):
    given = {"max_epochs": 3, "check_val_every_n_epoch": 1, "limit_train_batches": 1.0,
             "limit_val_batches": 1.0, "accumulate_grad_batches": 1, "devices": 1, "num_nodes": 1,
             "strategy": "auto", **trainer}  # fmt: skip
    return OmegaConf.create({"trainer": given})


@pytest.mark.parametrize(
    ("steps", "accumulate", "epochs", "updates"),
    [(None, 1, 3, 18), (-1, 1, 3, 18), (18, 1, 3, 18), (19, 1, 4, 19), (1, 1, 1, 1), (7, 4, 4, 7)],
)
def test_steps_take_the_place_of_epochs(steps, accumulate, epochs, updates):
    more = {} if steps is None else {"max_steps": steps}
    cfg = configured(accumulate_grad_batches=accumulate, **more)
    cfg = with_length(cfg, made_data())
    assert cfg.trainer.max_epochs == epochs
    assert updates_of(cfg, made_data()) == updates


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"check_val_every_n_epoch": None}, "trainer.check_val_every_n_epoch=null counts batches"),
        ({"check_val_every_n_epoch": None, "val_check_interval": 0.5}, "counts batches"),
        ({"max_steps": 5, "min_epochs": 2}, "trainer.min_epochs=2: trainer.max_steps=5 says"),
        ({"max_steps": 5, "min_steps": 2}, "trainer.min_steps=2: trainer.max_steps=5 says"),
        ({"val_check_interval": 7}, "never validates: there are 6 batches in an epoch; give fewer, "
                                    "or trainer.check_val_every_n_epoch=null"),
        ({"val_check_interval": 19, "check_val_every_n_epoch": None}, "there are 18 batches; give"),
        ({"val_check_interval": 0.1}, "trainer.val_check_interval=0.1 of 6 batches is less than"),
    ],
)  # fmt: skip
def test_what_could_not_be_is_refused(flags, message):
    cfg = configured(**flags)

    def checked():
        check_trainer(cfg)
        check_validation(cfg, made_data())

    with pytest.raises(ValueError, match=message):
        checked()


@pytest.mark.parametrize(
    "flags", [{}, {"val_check_interval": 6}, {"val_check_interval": 0.2}, {"max_steps": 5},
              {"val_check_interval": 18, "check_val_every_n_epoch": None}],
)  # fmt: skip
def test_what_can_be_is_not(flags):
    check_trainer(configured(**flags))
    check_validation(configured(**flags), made_data())


def test_epochs_that_follow_from_steps_are_no_other_configuration():
    common = {"paths": {"output_dir": "run"}, "sweep": {"resume": None}, "resume": "auto",
              "student": {"checkpoint": None}, "objective": {"temperature": 1}}  # fmt: skip
    one, other = ({**common, "trainer": {"max_steps": 9, "max_epochs": k}} for k in (8, 2))
    assert resume.difference(one, OmegaConf.create(other)) is None
    assert resume.fingerprint(OmegaConf.create(one)) == resume.fingerprint(OmegaConf.create(other))
    other["trainer"] = {"max_steps": 10, "max_epochs": 2}
    assert "trainer.max_steps=9, and this run says 10" in resume.difference(
        one, OmegaConf.create(other)
    )


def test_several_validations_are_spread_over_their_epoch(tmp_path):
    with (tmp_path / "metrics.csv").open("w") as file:
        writer = csv.writer(file)
        writer.writerows([["epoch", "step", "val/nll"], [0, 3, 1.0], [0, 7, 0.5], [1, 9, 0.4],
                          ["", 9, 7], [2, 11, ""], [2, 12, 0.3]])  # fmt: skip
    history = read_history(tmp_path / "metrics.csv")
    assert by_epoch(history, "val/nll") == ([0.5, 1.0, 2.0, 3.0], [1.0, 0.5, 0.4, 0.3])
