import csv

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger

from distill import Annealing, Distiller, Objective

KD = {"ce": "cross_entropy", "kl": "kl_divergence"}


class Record(pl.Callback):
    """Write down the temperature each batch was trained at, and optionally stop in the middle."""

    def __init__(self, stop_at=None):
        self.seen, self.stop_at = [], stop_at

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.seen.append(pl_module.objective.temperature)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.stop_at:
            raise RuntimeError("killed")


def fit(folder, tiny, loader, annealing, objective=None, epochs=3, resume=None, stop_at=None):
    torch.manual_seed(0)
    objective = objective or Objective(KD, 4.0, 0.9)
    teacher = tiny() if objective.needs_teacher else None
    module = Distiller(tiny(), teacher, objective, topk=(1,))
    record = Record(stop_at)
    checkpoint = ModelCheckpoint(
        folder, filename="{step}", every_n_train_steps=1, save_top_k=-1,
        auto_insert_metric_name=False,
    )  # fmt: skip
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, callbacks=[annealing, record, checkpoint],
        logger=CSVLogger(folder, name="", version=""), log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader(), ckpt_path=resume, weights_only=True)
    return record.seen, module


def test_the_temperature_is_constant_in_an_epoch_and_reaches_its_end_in_the_last(
    tiny, loader, tmp_path
):
    seen, _ = fit(tmp_path, tiny, loader, Annealing("linear", start=5.0, end=1.0))
    assert seen == [5.0] * 4 + [3.0] * 4 + [1.0] * 4


def test_by_step_it_moves_at_every_optimiser_step(tiny, loader, tmp_path):
    seen, _ = fit(tmp_path, tiny, loader, Annealing("linear", start=12.0, end=1.0, unit="step"))
    assert seen == pytest.approx([12.0 - i for i in range(12)])


def test_warmup_holds_the_start_and_duration_sets_the_arrival(tiny, loader, tmp_path):
    annealing = Annealing("linear", start=6.0, end=2.0, unit="step", warmup=3, duration=4)
    seen, _ = fit(tmp_path, tiny, loader, annealing)
    assert seen == pytest.approx([6, 6, 6, 6, 5, 4, 3, 2, 2, 2, 2, 2])


def test_it_starts_from_the_objectives_own_temperature(tiny, loader, tmp_path):
    seen, _ = fit(tmp_path, tiny, loader, Annealing("exponential", end=1.0))
    assert seen[::4] == pytest.approx([4.0, 2.0, 1.0])


def test_every_change_is_logged(tiny, loader, tmp_path):
    fit(tmp_path, tiny, loader, Annealing("linear", start=5.0, end=1.0))
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["temperature"]]
    assert [(int(r["step"]), float(r["temperature"])) for r in rows] == [(0, 5), (4, 3), (8, 1)]


def test_it_anneals_a_supervised_run(tiny, loader, tmp_path):
    objective = Objective({"ce": "tempered_cross_entropy"}, temperature=8.0)
    seen, module = fit(tmp_path, tiny, loader, Annealing("cosine", end=1.0), objective)
    assert seen[0] == 8.0
    assert module.objective.temperature == 1.0


def test_a_weight_warms_up_by_the_same_callback(tiny, loader, tmp_path):
    objective = Objective(KD)
    annealing = Annealing("linear", start=0.0, end=1.0, duration=2, value="terms.kl.weight")
    _, module = fit(tmp_path, tiny, loader, annealing, objective)
    assert module.objective.weights == {"ce": 1.0, "kl": 1.0}


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.parametrize("unit", ["epoch", "step"])
@pytest.mark.parametrize("step", [3, 6, 8])
def test_a_run_resumed_in_the_middle_of_an_epoch_sees_the_same_temperatures(
    tiny, loader, tmp_path, unit, step
):
    def annealing():
        return Annealing("linear", start=12.0, end=1.0, unit=unit)

    whole, _ = fit(tmp_path / "whole", tiny, loader, annealing())
    with pytest.raises(RuntimeError, match="killed"):
        fit(tmp_path / "killed", tiny, loader, annealing(), stop_at=step)
    path = tmp_path / "killed" / f"{step}.ckpt"
    rest, _ = fit(tmp_path / "rest", tiny, loader, annealing(), resume=path)
    assert rest == whole[step:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "no_such"}, "unknown annealing"),
        ({"unit": "hour"}, "epoch or step"),
        ({"end": float("nan")}, "finite"),
        ({"warmup": -1}, "at least 0"),
        ({"duration": 0}, "at least 1"),
    ],
)
def test_impossible_annealing_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Annealing(**options)


@pytest.mark.parametrize(("end", "value"), [("start", "temperature"), ("end", "alpha")])
def test_an_end_that_the_objective_refuses_is_named_before_training(end, value):
    objective = Objective({"kl": "kl_divergence"}, temperature=4.0, alpha=0.5)
    with pytest.raises(ValueError, match=rf"annealing\.{end}=-1: objective\.{value} must"):
        Annealing(**{end: -1.0, "value": value}).check(objective)
    assert objective.annealed[value] == {"temperature": 4.0, "alpha": 0.5}[value]


def test_a_module_without_an_objective_is_refused(tmp_path):
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, max_epochs=1)
    with pytest.raises(ValueError, match="needs a Distiller"):
        Annealing().setup(trainer, pl.LightningModule(), "fit")


def test_an_evaluation_keeps_the_temperature_that_training_ended_with(tiny, loader, tmp_path):
    annealing = Annealing("linear", start=5.0, end=2.0)
    _, module = fit(tmp_path, tiny, loader, annealing)
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, callbacks=[annealing],
                         enable_progress_bar=False, accelerator="cpu")  # fmt: skip
    trainer.test(module, loader(), verbose=False)
    assert module.objective.temperature == 2.0


def test_a_share_of_training_can_be_held(tiny, loader, tmp_path):
    annealing = Annealing("linear", start=6.0, end=2.0, unit="step", warmup=0.5, duration=1)
    seen, _ = fit(tmp_path, tiny, loader, annealing)
    assert seen == [6.0] * 7 + [2.0] * 5
