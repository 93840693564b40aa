"""The training step, from Python, with a plain Trainer."""

import copy

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn

from distill import Annealing, Distiller, Objective, Teacher
from distill.metrics import evaluate

KD = {"ce": "cross_entropy", "kl": "kl_divergence"}


def trainer(folder, epochs=2, **options):
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    return pl.Trainer(max_epochs=epochs, **{**defaults, **options})


def distiller(tiny, seed=0, objective=None, **options):
    torch.manual_seed(seed)
    teacher, student = tiny(width=16), tiny()
    return Distiller(student, teacher, objective or Objective(KD, 4.0, 0.9), topk=(1, 2), **options)


def test_a_step_is_the_gradient_step_of_the_formula(tiny, loader, tmp_path):
    module = distiller(tiny, optimizer={"opt": "momentum", "lr": 0.1, "momentum": 0.0})
    module.student.body[3].p = 0.0
    student = copy.deepcopy(module.student).train()
    images, labels = next(iter(loader()))
    teacher = module.teacher.model.eval()(images)
    logits = student(images)
    kl = (teacher / 4).softmax(1) * ((teacher / 4).log_softmax(1) - (logits / 4).log_softmax(1))
    loss = 0.1 * nn.functional.cross_entropy(logits, labels) + 0.9 * 16 * kl.sum(1).mean()
    loss.backward()
    expected = [p - 0.1 * p.grad for p in student.parameters()]
    trainer(tmp_path, 1, limit_train_batches=1).fit(module, loader(shuffle=False))
    for got, wanted in zip(module.student.parameters(), expected, strict=True):
        torch.testing.assert_close(got.detach(), wanted.detach(), rtol=1e-4, atol=1e-6)


def test_the_teacher_is_frozen_in_eval_and_outside_the_module_tree(tiny, loader, tmp_path):
    module = distiller(tiny)
    before = {k: v.clone() for k, v in module.teacher.model.state_dict().items()}
    trainer(tmp_path).fit(module, loader(), loader(seed=1))
    module.train()
    assert not module.teacher.model.training
    assert all(torch.equal(v, before[k]) for k, v in module.teacher.model.state_dict().items())
    assert not [n for n, m in module.named_modules() if m is module.teacher.model]
    assert copy.deepcopy(module).teacher is module.teacher


def test_a_teacher_put_into_training_mode_still_answers_in_eval(tiny):
    teacher = Teacher(tiny())
    view = torch.rand(4, 1, 8, 8)
    expected = teacher(view)
    teacher.model.train()
    assert torch.equal(teacher(view), expected)


def test_the_same_seed_gives_the_same_bytes(tiny, loader, tmp_path):
    def weights(seed):
        module = distiller(tiny, seed)
        pl.seed_everything(seed, verbose=False)
        trainer(tmp_path).fit(module, loader(shuffle=True))
        return torch.cat([p.detach().flatten() for p in module.student.parameters()])

    first, second, other = weights(0), weights(0), weights(1)
    assert first.numpy().tobytes() == second.numpy().tobytes()
    assert not torch.equal(first, other)


@pytest.mark.parametrize("ema", [False, True])
def test_a_checkpoint_holds_student_and_annealed_values_and_no_teacher(tiny, loader, tmp_path, ema):
    module = distiller(tiny)
    callbacks = [
        Annealing("linear", start=5.0, end=2.0),
        ModelCheckpoint(tmp_path, filename="last"),
        *([EMAWeightAveraging(decay=0.5)] if ema else []),
    ]
    trainer(tmp_path, 3, callbacks=callbacks, enable_checkpointing=True).fit(module, loader())
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(content["state_dict"]) == {f"student.{k}" for k in module.student.state_dict()}
    assert content["distill"]["objective"]["temperature"] == 2.0
    names = {name for part in content.values() if isinstance(part, dict) for name in part}
    assert not [name for name in names if "teacher" in str(name)]
    if ema:
        raw = content["current_model_state"]
        assert any(not torch.equal(v, raw[k]) for k, v in content["state_dict"].items())
        last = content["state_dict"]["student.head.weight"]
        torch.testing.assert_close(module.student.head.weight.detach(), last)


def test_logged_metrics_equal_the_functions_on_all_samples_at_once(tiny, loader, tmp_path):
    module = distiller(tiny)
    fitted = trainer(tmp_path)
    fitted.fit(module, loader(), loader(50, seed=1))  # 50 samples: a ragged last batch
    images, labels = map(torch.cat, zip(*loader(50, seed=1), strict=True))
    module.eval()
    with torch.inference_mode():
        numbers = evaluate(module(images), labels, module.teacher(images), topk=(1, 2))
    for name in ("top1", "top2", "mrr", "nll", "brier", "ece", "agreement"):
        logged = fitted.callback_metrics[f"val/{name}"].item()
        assert logged == pytest.approx(numbers[name], abs=1e-6), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topk": (1, 4)}, "top-4 says nothing among 4 classes"),
        ({"optimizer": {"opt": "no_such"}}, "optimizer .* was refused"),
        ({"optimizer": {"opt": "sgd", "lrr": 1}}, "optimizer .* was refused"),
        ({"scheduler": {"sched": "no_such"}}, "scheduler .* was refused|unknown schedule"),
    ],
)
def test_mistakes_are_explained(tiny, loader, tmp_path, options, message):
    def build_and_fit():
        trainer(tmp_path).fit(Distiller(tiny(), tiny(), Objective(KD), **options), loader())

    with pytest.raises(ValueError, match=message):
        build_and_fit()


def test_parts_that_do_not_fit_are_refused(tiny):
    with pytest.raises(ValueError, match="teacher has 5 classes and the student 4"):
        Distiller(tiny(4), tiny(5), Objective(KD))
    with pytest.raises(ValueError, match="compares with a teacher"):
        Distiller(tiny(), None, Objective(KD))
    with pytest.raises(ValueError, match="give num_classes"):
        Distiller(nn.Flatten())


def test_default_topk_is_trimmed_below_the_number_of_classes(tiny):
    assert Distiller(tiny(4)).topk == (1,)
    assert Distiller(tiny(10)).topk == (1, 5)


def test_the_schedule_is_timms_in_optimiser_steps(tiny, loader, tmp_path):
    module = distiller(
        tiny,
        optimizer={"opt": "sgd", "lr": 0.1},
        scheduler={"sched": "cosine", "min_lr": 0.0, "warmup_epochs": 0},
    )
    seen = []

    class Watch(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen.append(optimizer.param_groups[0]["lr"])

    trainer(tmp_path, 2, callbacks=[Watch()]).fit(module, loader())
    steps = torch.arange(8, dtype=torch.float64)
    torch.testing.assert_close(
        torch.tensor(seen, dtype=torch.float64), 0.05 * (1 + (torch.pi * steps / 8).cos())
    )


def test_gradient_accumulation_steps_the_schedule_once_per_update(tiny, loader, tmp_path):
    module = distiller(tiny, optimizer={"opt": "sgd"}, scheduler={"sched": "cosine"})
    fitted = trainer(tmp_path, 1, accumulate_grad_batches=2)
    fitted.fit(module, loader())
    assert fitted.global_step == 2


def test_a_teacher_whose_answers_have_the_wrong_shape_is_named(tiny):
    teacher = Teacher(tiny(5))
    teacher.model.num_classes = 4
    with pytest.raises(ValueError, match=r"answers 2 images with \[2, 5\], and not with \[2, 4\]"):
        teacher(torch.rand(2, 1, 8, 8))
