import pytest
import torch

from distill import Objective
from distill.losses import kl_divergence
from distill.objective.temperature import LearnedTemperature

torch.manual_seed(0)
S, Z = torch.randn(2, 6, 5)
Y = torch.tensor([0, 1, 2, 3, 4, 0])
KL = {"kl": "kl_divergence"}


@pytest.mark.parametrize("scope", ["run", "instance"])
def test_it_starts_at_the_objectives_temperature(scope):
    objective = Objective(KL, 3.0, curriculum={"scope": scope, "num_classes": 5})
    assert objective.temperature == pytest.approx(3.0, abs=1e-5)
    expected = kl_divergence(S, Z, 3.0).mean()
    torch.testing.assert_close(objective(S, Z, Y)["loss"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_the_gradient_of_the_temperature_is_reversed_and_scaled(strength):
    objective = Objective(KL, 3.0, curriculum={})
    objective.annealed["curriculum.strength"] = strength
    objective(S, Z, Y)["loss"].backward()
    raw = objective.curriculum.raw
    free = raw.detach().clone().requires_grad_()
    plain = kl_divergence(S, Z, 1.0 + 20.0 * free.sigmoid()).mean()
    (gradient,) = torch.autograd.grad(plain, free)
    torch.testing.assert_close(raw.grad, -strength * gradient)


def test_descent_raises_the_loss_that_the_student_lowers():
    objective = Objective(KL, 4.0, curriculum={})
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.05)
    before = objective(S, Z, Y)["loss"].item()
    for _ in range(20):
        optimizer.zero_grad()
        objective(S, Z, Y)["loss"].backward()
        optimizer.step()
    assert objective(S, Z, Y)["loss"].item() > before


def test_of_instances_each_has_its_own_and_the_students_gradient_passes_by():
    module = LearnedTemperature(4.0, scope="instance", num_classes=5)
    torch.nn.init.normal_(module.network[-1].weight)
    student = S.clone().requires_grad_()
    temperature = module(student, Z)
    assert temperature.shape == (6, 1)
    assert len(set(temperature.flatten().tolist())) == 6
    assert module.last == pytest.approx(temperature.mean().item(), rel=1e-5)
    temperature.sum().backward()
    assert student.grad is None
    assert all(p.grad is not None for p in module.parameters())


def test_it_is_learned_saved_and_logged(tiny, loader, tmp_path):
    import pytorch_lightning as pl

    from distill import Distiller

    def fit(folder, resume=None):
        torch.manual_seed(0)
        objective = Objective(KL, 4.0, curriculum={})
        module = Distiller(
            tiny(), tiny(), objective, topk=(1,), optimizer={"opt": "momentum", "lr": 0.5}
        )
        trainer = pl.Trainer(
            accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path / folder,
        )  # fmt: skip
        trainer.fit(module, loader(shuffle=False), ckpt_path=resume, weights_only=True)
        return trainer, module

    trainer, module = fit("first")
    assert module.objective.temperature != pytest.approx(4.0, abs=1e-4)
    assert trainer.callback_metrics["train/temperature"] > 0
    path = trainer.checkpoint_callback.best_model_path
    state = torch.load(path, weights_only=True)["state_dict"]
    assert torch.equal(state["objective.curriculum.raw"], module.objective.curriculum.raw.data)
    _, resumed = fit("second", resume=path)
    assert resumed.objective.temperature == module.objective.temperature


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 0.5}, "low < objective.temperature"),
        ({"start": 30.0}, "low < objective.temperature"),
        ({"start": 4.0, "scope": "batch"}, "run or instance"),
        ({"start": 4.0, "scope": "instance"}, "needs num_classes"),
    ],
)
def test_impossible_curricula_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LearnedTemperature(**options)


def test_a_learned_temperature_cannot_be_scheduled_too():
    with pytest.raises(ValueError, match="cannot anneal 'temperature'"):
        Objective(KL, 4.0, curriculum={}).annealed["temperature"] = 2.0
