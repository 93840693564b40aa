"""Teachers as a run makes them: whose classes are matched, and whose images have their own size."""

import json
import logging
import re

import pytest
import timm
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from distill import run, save_student
from distill.config import build
from distill.config.overrides import CONF
from distill.models.build import Normalize
from distill.objective.objective import Objective
from distill.training import auxiliary
from distill.training.cache import fit_key, identity_of
from distill.training.fit import load_baseline
from distill.training.teachers import load_teacher, prepare_teachers

ARGS = {"layers": [1, 1, 1, 1], "channels": [4, 8, 16, 32], "stem_type": "deep", "stem_width": 4}
ORDER = [3, 0, 4, 1, 2, 9, 8, 7, 6, 5]
KD = Objective({"kl": "kl_divergence"})
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def composed(tmp_path):
    def make(*overrides, name="train", folder="run"):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            paths = (f"paths.output_dir={tmp_path / folder}", f"paths.cache={tmp_path / 'cache'}")
            quick = ("trainer.accelerator=cpu", "report=false")
            return compose(name, overrides=[*paths, *quick, *overrides])

    return make


@pytest.fixture
def bundles(tmp_path):
    """The same model twice: its classes in the digits' order, and in another."""
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=10, in_chans=1, **ARGS)
    known = {"input_size": (1, 32, 32), "mean": [0.5], "std": [0.5]}
    first = save_student(model, tmp_path / "first", classes=list("0123456789"), **known)
    with torch.no_grad():
        for tensor in (model.fc.weight, model.fc.bias):
            tensor.copy_(tensor[ORDER])
    names = [str(k) for k in ORDER]
    return first, save_student(model, tmp_path / "second", classes=names, **known)


@pytest.fixture
def views():
    return torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(1))


def test_every_member_of_an_ensemble_has_its_classes_matched(composed, bundles, views):
    def answers(*paths):
        given = f"teacher.checkpoints=[{','.join(map(str, paths))}]"
        cfg = composed("teacher=ensemble", given)
        return load_teacher(cfg, build.build_data(cfg))(views)

    first, second = bundles
    torch.testing.assert_close(answers(first, second), answers(first, first), **CLOSE)


def test_a_baseline_of_another_order_is_matched_too(composed, bundles, views, caplog):
    caplog.set_level(logging.INFO, "distill")
    cfg = composed("teacher=none", name="eval")
    data = build.build_data(cfg)
    answers = []
    for path in bundles:
        cfg.baseline = str(path)
        with torch.inference_mode():
            answers.append(load_baseline(cfg, data).eval()(views))
    torch.testing.assert_close(*answers, **CLOSE)
    assert f"baseline={bundles[1]} has the data's 10 classes in another order" in caplog.text


def test_a_kept_teacher_is_of_the_datas_order_of_classes(composed):
    cfg = composed()
    data = build.build_data(cfg)
    key = fit_key(auxiliary.supervised_config(cfg, "teacher"), data)
    data.source.classes.reverse()
    del data.__dict__["fingerprint"]
    assert fit_key(auxiliary.supervised_config(cfg, "teacher"), data) != key


@pytest.mark.slow
def test_a_teacher_in_another_order_teaches_the_same(composed, bundles, tmp_path):
    """As it was, one of 63.57 % in order taught at 17.68 % in another."""
    found = []
    for path in bundles:
        run.train(composed("teacher=timm", f"teacher.checkpoint={path}", "logger=none",
                           "callbacks=none", "baseline=false", "trainer.max_epochs=1",
                           "objective.alpha=1", folder=path.name))  # fmt: skip
        summary = json.loads((tmp_path / path.name / "summary.json").read_text())
        found.append([summary["teacher"]["nll"], summary["student"]["kl_from_teacher"]])
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_views_are_resized_for_a_teacher_as_torch_resizes_them():
    plain, sized = Normalize([0.25], [0.5]), Normalize([0.25], [0.5], (48, 40))
    view = (torch.rand(2, 1, 12, 10, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    found = sized(view)
    expected = torch.nn.functional.interpolate(view, (48, 40), mode="bicubic", antialias=True)
    assert expected.max() > 1  # a bicubic kernel overshoots
    assert torch.equal(found, plain(expected.clamp(0, 1)))
    assert torch.equal(sized(expected.clamp(0, 1)), found)  # of the right size, it stays
    assert repr(sized) != repr(plain)


def photos(root, side=24):
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 12), ("val", 4), ("test", 4)):
        for label, name in enumerate(("ape", "bee")):
            (root / part / name).mkdir(parents=True)
            for k in range(count):
                pixels = torch.randint(0, 128, (side, side, 3), generator=generator) + 100 * label
                image = Image.fromarray(pixels.to(torch.uint8).numpy())
                image.save(root / part / name / f"{k}.png")
    return root


@pytest.mark.slow
def test_a_transformer_of_fixed_size_teaches_a_student_of_smaller_views(composed, tmp_path, caplog):
    torch.manual_seed(0)
    narrow = {"depth": 1, "embed_dim": 32, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=2, **narrow)
    teacher = save_student(model, tmp_path / "vit", classes=["bee", "ape"])
    known = ("data=folder", f"data.root={photos(tmp_path / 'photos')}", "data.image_size=32",
             "data.batch_size=8", "teacher=timm", f"teacher.checkpoint={teacher}",
             "student=timm", "student.name=test_resnet", "trainer.max_epochs=1", "logger=none",
             "callbacks=none", "baseline=false")  # fmt: skip
    caplog.set_level("INFO", "distill")
    smaller = composed(*known)
    load_teacher(smaller, build.build_data(smaller))
    assert "position embeddings are resampled for 32 × 32 pixels" in caplog.text
    caplog.clear()
    run.train(composed(*known, "teacher.image_size=224"))
    assert "resampled" not in caplog.text
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    patches = (224 // 16) ** 2
    assert summary["teacher"]["flops"] > 2 * patches * 3 * 16**2 * 32  # of its embedding alone
    assert summary["student"]["kl_from_teacher"] > 0


def test_another_size_is_another_teacher(composed, bundles):
    given = ("teacher=timm", f"teacher.checkpoint={bundles[0]}")
    small, large = (composed(*given, f"teacher.image_size={size}") for size in ("null", "[48,40]"))
    data = build.build_data(small)
    assert build.shared_key(small, "teacher") != build.shared_key(large, "teacher")
    ours, theirs = (load_teacher(cfg, data) for cfg in (small, large))
    assert identity_of(ours)[0] == identity_of(theirs)[0]
    assert identity_of(ours)[1] != identity_of(theirs)[1]


def test_a_trained_teacher_learns_at_the_size_that_it_answers_at(composed, tmp_path):
    known = ("teacher.fit.max_epochs=1", "trainer.limit_train_batches=1", "logger=none",
             "callbacks=none", "teacher.image_size=40")  # fmt: skip
    cfg = composed(*known)
    data = build.build_data(cfg)
    plain = composed(*known, "teacher.image_size=null")
    keys = {fit_key(auxiliary.supervised_config(one, "teacher"), data) for one in (cfg, plain)}
    assert len(keys) == 2
    (teacher,), _ = prepare_teachers(cfg, data, KD)
    (kept,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    settings = json.loads((kept / "config.json").read_text())["pretrained_cfg"]
    assert settings["input_size"] == [1, 40, 40]
    assert teacher.normalize.size == (40, 40)


# Bits, batches and devices of its own.


@pytest.mark.parametrize("precision", ["bf16", "fp16", "int8"])
def test_a_precision_of_its_own_is_said_with_what_it_costs(composed, bundles, caplog, precision):
    caplog.set_level(logging.INFO, "distill")
    given = ("teacher=timm", f"teacher.checkpoint={bundles[0]}")
    data = build.build_data(composed(*given))
    plain = load_teacher(composed(*given), data)
    teacher = load_teacher(composed(*given, f"teacher.precision={precision}"), data)
    (said,) = [r.message for r in caplog.records if "weights in" in r.message]
    assert re.search(
        rf"weights in {precision}, [\d.]+ kB instead of [\d.]+ kB; a KL of \S+ nats at T = 1, "
        r"\S+ nats at T = 4 from its float32 answers \(mean over 32 images\)", said
    )  # fmt: skip
    views = torch.rand(8, 1, 32, 32)
    full, ours = plain(views).double(), teacher(views)
    assert ours.dtype == torch.float32
    assert 0 < (full - ours).abs().max() < 0.1
    assert identity_of(teacher) != identity_of(plain)
    single = load_teacher(composed(*given, "teacher.precision=fp32"), data)
    assert identity_of(single) == [*identity_of(plain), "fp32"]


def test_a_batch_size_and_a_device_of_its_own_reach_the_teacher(composed, bundles):
    given = ("teacher=timm", f"teacher.checkpoint={bundles[0]}")
    data = build.build_data(composed(*given))
    assert load_teacher(composed(*given), data).batch_size == data.batch_size
    own = composed(*given, "teacher.batch_size=8", "teacher.device=cpu")
    teacher = load_teacher(own, data)
    assert (teacher.batch_size, teacher.device) == (8, torch.device("cpu"))
    asked = []
    teacher.model.register_forward_pre_hook(lambda _, given: asked.append(len(given[0])))
    assert teacher(torch.rand(20, 1, 32, 32)).shape == (20, 10)
    assert asked == [8, 8, 8]
