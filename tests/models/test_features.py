import pytest
import timm
import torch
import torch.nn.functional as F

from distill import Distiller, Objective, save_student
from distill.data.batch import Batch
from distill.models.build import ModelSpec, build_model
from distill.models.features import check_features, forward_with_features, model_info
from distill.models.weights import DataShape

SHAPE = DataShape(5, 3, (32, 32))
HINTS = {
    "ce": "cross_entropy",
    "hint": "hint",
    "attention": "attention_transfer",
    "kl": "kl_divergence",
}


def pair():
    torch.manual_seed(0)
    return [
        build_model(ModelSpec(name, {}), SHAPE, "student").eval()
        for name in ("cifar_resnet8", "cifar_wrn_16_2")
    ]


@pytest.mark.parametrize(
    "name",
    ["cifar_resnet8", "resnet10t", "mobilenetv3_small_050", "cifar_vgg8", "cifar_mobilenetv2",
     "cifar_shufflenet_v1", "cifar_shufflenet_v2"],
)  # fmt: skip
def test_logits_are_the_models_own_and_maps_have_the_declared_channels(name):
    torch.manual_seed(0)
    model = build_model(ModelSpec(name), SHAPE, "student").eval()
    images, stages = torch.randn(2, 3, 32, 32), (-2, -1)
    with torch.inference_mode():
        logits, (maps, embedding, token) = forward_with_features(model, images, stages)
        torch.testing.assert_close(logits, model(images))
    info = model_info(model, stages, "student", maps=True)
    assert tuple(m.shape[1] for m in maps) == info.channels
    assert embedding.shape == (2, info.embedding)
    assert token is logits
    assert info.classifier is not None
    with torch.inference_mode():
        torch.testing.assert_close(info.classifier(embedding), logits)


@pytest.mark.parametrize("name", ["cifar_resnet8", "mobilenetv3_small_050"])
def test_one_pass_of_the_head_gives_logits_and_what_they_are_made_of(name):
    model = build_model(ModelSpec(name, {"drop_rate": 0.5}), SHAPE, "student").train()
    logits, features = forward_with_features(model, torch.randn(4, 3, 32, 32), (-1,))
    torch.testing.assert_close(model.get_classifier()(features.embedding), logits)


def test_of_a_teacher_that_gives_no_maps_logits_alone_may_be_compared(tiny):
    student, _ = pair()
    heads = Objective({"heads": "stage_heads", "kl": "kl_divergence"}, stages=(-2, -1))
    Distiller(student, tiny(5), heads)  # reads the student's maps
    assert len(heads.helpers["heads"].heads) == 2


def test_student_and_projection_learn_and_only_the_student_is_in_the_bundle(tmp_path):
    student, teacher = pair()
    before = student.state_dict().keys()
    objective = Objective(HINTS, 4.0, stages=(-2, -1))
    module = Distiller(student, teacher, objective, topk=(1,))
    view, target = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    student.train()
    losses = module.learned(Batch(view, target)).losses
    losses["loss"].backward()
    assert all(p.grad is not None for p in [*student.parameters(), *objective.parameters()])
    assert [p.weight.shape[:2] for p in objective.helpers["hint"].projections] == [
        (64, 32),
        (128, 64),
    ]
    assert all(p.grad is None for p in teacher.parameters())
    path = save_student(student, tmp_path / "student")
    from safetensors.torch import load_file

    assert load_file(path / "model.safetensors").keys() == before


def test_the_projection_is_optimised_beside_the_student(tmp_path):
    import pytorch_lightning as pl
    from torch.utils.data import DataLoader, TensorDataset

    student, teacher = pair()
    module = Distiller(student.train(), teacher, Objective(HINTS), topk=(1,))
    before = module.objective.helpers["hint"].projections[0].weight.detach().clone()
    data = TensorDataset(torch.rand(16, 3, 32, 32), torch.arange(16) % 5)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, 8), DataLoader(data, 8))
    assert not torch.equal(before, module.objective.helpers["hint"].projections[0].weight)
    assert {"val/hint", "val/attention"} <= trainer.callback_metrics.keys()


def test_models_without_feature_maps_and_stages_that_are_not_there_are_refused(tiny):
    student, teacher = pair()
    with pytest.raises(ValueError, match="student Tiny gives no feature maps"):
        Distiller(tiny(5), teacher, Objective(HINTS))
    with pytest.raises(ValueError, match="teacher Tiny gives no feature maps"):
        Distiller(student, tiny(5), Objective(HINTS))
    with pytest.raises(ValueError, match=r"stages=\[7\]: the student has 3 stages"):
        Distiller(student, teacher, Objective(HINTS, stages=(7,)))


def test_a_vision_transformer_can_be_hinted():
    size = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}
    student = timm.create_model("vit_tiny_patch16_224", num_classes=5, **size).eval()
    logits, ((last,), *_) = forward_with_features(student, torch.zeros(2, 3, 32, 32), (-1,))
    assert logits.shape == (2, 5)
    assert last.shape == (2, 24, 4, 4)


def test_a_distillation_token_answers_by_itself_in_training():
    size = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}
    student = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=5, **size)
    objective = Objective({"ce": "cross_entropy", "token": "token_cross_entropy"}, alpha=0.5)
    module = Distiller(student, build_model(ModelSpec("resnet10t"), SHAPE, "teacher"), objective)
    batch = Batch(torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]))
    student.train()
    logits, ours = forward_with_features(student, batch.view, objective.stages)
    teacher = module.teacher(batch.view)
    expected = 0.5 * F.cross_entropy(logits, batch.target) + 0.5 * F.cross_entropy(
        ours.token, teacher.argmax(1)
    )
    losses = module.learned(batch).losses
    torch.testing.assert_close(losses["loss"], expected)
    losses["loss"].backward()
    assert student.head_dist.weight.grad.abs().sum() > 0
    student.eval()
    logits, (_, _, token) = forward_with_features(student, batch.view, (-1,))
    torch.testing.assert_close(token, logits)
    with pytest.raises(ValueError, match="ResNet has no distillation token: take one"):
        objective.helpers.check(timm.create_model("resnet10t", num_classes=5), None)


def test_maps_that_are_not_what_a_model_declares_are_refused_ahead():
    model = timm.create_model("resnet18", num_classes=4)
    check_features(model, (3, 32, 32), [1, 2], "student")
    assert model.training
    model.feature_info[2]["num_chs"] += 1
    with pytest.raises(ValueError, match=r"the student ResNet gives no features .*declares"):
        check_features(model, (3, 32, 32), [1, 2], "student")
    model.layer2 = torch.nn.Conv2d(5, 5, 1)
    with pytest.raises(ValueError, match="leave out the terms"):
        check_features(model, (3, 32, 32), [1], "student")
