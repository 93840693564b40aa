import csv

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging
from pytorch_lightning.loggers import CSVLogger
from scipy.optimize import minimize

from distill import Distiller, Objective
from distill.models.channels import dense_weights
from distill.training.callbacks.finite import FiniteLoss
from distill.training.callbacks.sparsity import Sparsity, shrink_channels, shrink_weights

STILL = {"opt": "sgd", "lr": 1e-7, "weight_decay": 0.0}  # so slow that only sparsity moves a weight


class Rates(pl.Callback):
    """Write down the learning rate of each step."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(optimizer.param_groups[0]["lr"])


def fit(folder, tiny, loader, sparsity, optimizer=STILL, kind=Distiller, scheduler=None, beside=(),
        **options):  # fmt: skip
    torch.manual_seed(0)
    student = tiny()
    module = kind(student, None, Objective({"ce": "cross_entropy"}), topk=(1,),
                  optimizer=optimizer, scheduler=scheduler)  # fmt: skip
    before = {name: weight.detach().clone() for name, weight in student.named_parameters()}
    rates = Rates()
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=3, log_every_n_steps=1, enable_checkpointing=False,
        callbacks=[*beside, rates, *([sparsity] if sparsity else [])],
        logger=CSVLogger(folder, name="", version=""), enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(module, loader())
    return rates.seen, before, dict(student.named_parameters())


def fallen(before, after, name):
    """Return by how much the weights that are not zero have moved towards it, least and most."""
    alive = after[name] != 0
    moved = (before[name].abs() - after[name].abs())[alive]
    return moved.min().item(), moved.max().item()


@pytest.mark.parametrize("amount", [0.0, 0.1, 0.75])
def test_a_weight_becomes_the_minimiser_that_a_search_finds(amount):
    before = torch.tensor([-1.3, -0.75, -0.2, 0.0, 0.05, 0.1, 0.9], dtype=torch.float64)
    after = before.clone()
    shrink_weights([after], [amount])
    grid = torch.linspace(-1.5, 1.5, 300_001, dtype=torch.float64)
    for old, new in zip(before, after, strict=True):
        best = ((grid - old) ** 2 / 2 + amount * grid.abs()).argmin()
        assert new.item() == pytest.approx(grid[best].item(), abs=1e-5)
    assert (after == 0).sum() == (before.abs() <= amount).sum()


@pytest.mark.parametrize("amount", [0.0, 0.05, 0.6, 5.0])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_channels_become_the_minimiser_that_a_solver_finds(count, amount):
    generator = torch.Generator().manual_seed(count)
    filters, shift = (
        torch.randn(count, *shape, generator=generator, dtype=torch.float64)
        for shape in ((3, 2, 2), ())
    )
    filters = filters.to(memory_format=torch.channels_last)
    old = torch.cat([filters.flatten(1), shift[:, None]], dim=1)

    def cost(values):
        x = torch.from_numpy(values).view_as(old).requires_grad_()
        penalty = amount * x.norm(dim=1).sum() ** 2 / (2 * count)
        loss = ((x - old) ** 2).sum() / 2 + penalty
        (slope,) = torch.autograd.grad(loss, x)
        return loss.item(), slope.flatten().numpy()

    # Not from zero, where the penalty has no gradient: a norm that the solver brings near it counts
    found = minimize(cost, old.flatten().numpy() * 0.5, jac=True, tol=1e-14)
    shrink_channels([filters, shift], [amount, amount])
    new = torch.cat([filters.flatten(1), shift[:, None]], dim=1)
    assert cost(new.flatten().numpy())[0] <= found.fun + 1e-9
    np.testing.assert_allclose(new, found.x.reshape(new.shape), atol=1e-3)
    assert new.norm(dim=1).max() > 0  # the strongest channel never dies
    if amount == 5.0 and count == 7:
        assert 0 < (new == 0).all(1).sum() < count


def test_nothing_is_made_of_channels_that_are_zero():
    weight = torch.zeros(3, 2)
    shrink_channels([weight], [0.3])
    assert torch.equal(weight, torch.zeros(3, 2))


def test_zeros_are_exact_under_adam_and_only_in_convolutions_and_linear_layers(
    tiny, loader, tmp_path
):
    adam = {"opt": "adamw", "lr": 0.02}
    _, _, after = fit(tmp_path, tiny, loader, Sparsity(3.0, start=3.0), adam)
    for name, weight in after.items():
        zeros = (weight == 0).float().mean()
        assert (zeros > 0.5) == (name in ("body.0.weight", "head.weight")), name


@pytest.mark.parametrize("groups", [False, True])
def test_a_strength_of_zero_changes_no_byte(tiny, loader, tmp_path, groups):
    adam = {"opt": "adamw", "lr": 0.02}
    _, _, plain = fit(tmp_path / "plain", tiny, loader, None, adam)
    _, _, other = fit(tmp_path / "zero", tiny, loader, Sparsity(0.0, groups=groups), adam)
    assert all(torch.equal(plain[name], other[name]) for name in plain)


@pytest.mark.parametrize(("accumulated", "steps"), [(1, 12), (2, 6), (3, 6)])
def test_it_acts_once_for_each_step_of_the_optimiser(tiny, loader, tmp_path, accumulated, steps):
    seen, before, after = fit(tmp_path, tiny, loader, Sparsity(1e3, start=1e3),
                              accumulate_grad_batches=accumulated)  # fmt: skip
    assert len(seen) == steps
    for name in ("body.0.weight", "head.weight"):
        assert fallen(before, after, name) == pytest.approx([steps * 1e-4] * 2, abs=1e-5)


class Broken(Distiller):
    def training_step(self, batch, batch_idx):
        found = super().training_step(batch, batch_idx)
        return {**found, "loss": found["loss"] * torch.nan}


@pytest.mark.parametrize("groups", [False, True])
def test_an_update_that_is_left_out_shrinks_nothing(tiny, loader, tmp_path, groups):
    sparsity = Sparsity(1e6, groups=groups)
    _, before, after = fit(tmp_path, tiny, loader, sparsity, kind=Broken,
                           beside=[FiniteLoss("skip")])  # fmt: skip
    assert all(torch.equal(before[name], weight) for name, weight in after.items())


def test_the_rate_is_the_one_that_the_step_was_made_with(tiny, loader, tmp_path):
    cosine = {"sched": "cosine", "warmup_epochs": 1, "warmup_lr": 1e-9}
    seen, before, after = fit(tmp_path, tiny, loader, Sparsity(1e3, start=1e3), scheduler=cosine)
    assert len(set(seen)) == 12
    expected = 1e3 * sum(seen)
    assert fallen(before, after, "head.weight") == pytest.approx([expected] * 2, abs=1e-6)


class TwoRates(Distiller):
    def configure_optimizers(self):
        body, head = self.student.body.parameters(), self.student.head.parameters()
        return torch.optim.SGD([{"params": body, "lr": 1e-7}, {"params": head, "lr": 3e-7}])


def test_each_weight_has_the_rate_of_its_own_group(tiny, loader, tmp_path):
    _, before, after = fit(tmp_path, tiny, loader, Sparsity(1e3, start=1e3), kind=TwoRates)
    for name, rate in (("body.0.weight", 1e-7), ("head.weight", 3e-7)):
        assert fallen(before, after, name) == pytest.approx([12e3 * rate] * 2, abs=1e-5)


def test_the_strength_follows_its_schedule_and_is_logged_with_the_zeros(tiny, loader, tmp_path):
    sparsity = Sparsity(6e3, start=0.0, unit="step", warmup=2, duration=3)
    _, before, after = fit(tmp_path, tiny, loader, sparsity)
    strengths = [0, 0, 0, 2e3, 4e3, *[6e3] * 7]
    assert fallen(before, after, "head.weight")[1] == pytest.approx(1e-7 * sum(strengths), abs=1e-5)
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    changes = [(int(r["step"]), float(r["sparsity_strength"])) for r in rows
               if r["sparsity_strength"]]  # fmt: skip
    assert changes == [(0, 0.0), (3, 2e3), (4, 4e3), (5, 6e3)]
    shares = [float(row["train/zeros"]) for row in rows if row["train/zeros"]]
    weights = torch.cat([after[f"{name}.weight"].flatten() for name in ("body.0", "head")])
    assert len(shares) == 3
    assert shares[-1] == pytest.approx((weights == 0).float().mean().item(), abs=1e-6)


def test_the_average_of_zeros_that_come_and_go_is_refused(tiny, loader, tmp_path):
    with pytest.raises(ValueError, match="leave out sparsity or ema"):
        fit(tmp_path, tiny, loader, Sparsity(), beside=[EMAWeightAveraging()])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": -1.0}, "sparsity.strength must be finite and at least 0"),
        ({"start": float("nan")}, "sparsity.start"),
        ({"schedule": "linaer"}, "unknown sparsity 'linaer'"),
        ({"unit": "batch"}, "sparsity.unit must be epoch or step"),
        ({"warmup": -1}, "sparsity.warmup"),
        ({"schedule": "exponential"}, "positive ends"),
    ],
)
def test_what_it_cannot_follow_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sparsity(**options)


def test_the_weights_are_those_of_convolutions_and_linear_layers(tiny):
    assert list(dense_weights(tiny())) == ["body.0.weight", "head.weight"]
