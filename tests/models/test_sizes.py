"""A Lightning checkpoint says at what size its student is trained, and how pictures come to it."""

import pytest
import torch
from hydra import compose, initialize_config_dir

from distill.config import build, checks
from distill.config.overrides import CONF
from distill.models.build import ModelSpec
from distill.models.sizes import declared_size
from distill.training.fit import student_module
from distill.training.untrained import build_untrained
from tests.data.conftest import write_folder

ALONE = ("objective=supervised", "teacher=none")


@pytest.fixture
def composed(tmp_path):
    write_folder(tmp_path / "photos", ("train",), classes=("cat", "dog"), count=12)

    def make(*overrides):
        given = ["data=folder", f"data.root={tmp_path / 'photos'}", "data.batch_size=4",
                 f"paths.output_dir={tmp_path}", f"paths.cache={tmp_path}", *overrides]  # fmt: skip
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose("train", overrides=given)

    return make


def test_a_checkpoint_decides_the_size_and_brings_its_preprocessing(composed, tmp_path):
    cfg = composed("data.image_size=[32,48]", "data.view.crop_pct=0.9", *ALONE)
    data = build.build_data(cfg)
    module = student_module(cfg, data, None, build_untrained(cfg, data))
    content = {"state_dict": {f"student.{k}": v for k, v in module.student.state_dict().items()}}
    module.on_save_checkpoint(content)
    torch.save(content, tmp_path / "last.ckpt")
    told = f"student.checkpoint={tmp_path / 'last.ckpt'}"
    assert build.build_data(composed(told)).image_size == (32, 48)
    judged = build.build_data(composed(told), build.to_judge(composed(told)))
    assert judged.preprocessing["crop_pct"] == 0.9
    assert checks.differing_views(composed(told), judged) is None
    size = declared_size(ModelSpec(checkpoint=str(tmp_path / "last.ckpt")))
    assert (size.size, size.exact) == ((32, 48), True)


@pytest.mark.parametrize(
    ("overrides", "shown"),
    [
        (["student=timm", "student.name=cifar_resnet8x4"], (32, 32)),
        (["student=timm", "student.name=vit_tiny_patch16_224"], (224, 224)),  # of one size
        (["student=timm", "student.name=resnet18"], (32, 32)),  # the pictures are of 16 × 20
        (["student=timm", "teacher=timm", "teacher.name=vit_tiny_patch16_224"], (224, 224)),
        (["student=timm", "student.name=resnet18", "data.image_size=40"], (40, 40)),
    ],
)
def test_the_student_decides_or_else_the_teacher(composed, overrides, shown):
    assert build.build_data(composed(*overrides)).image_size == shown


def test_runs_of_other_sizes_do_not_share_their_data(composed):
    one, other = (composed("student=timm", f"student.name={name}")
                  for name in ("resnet18", "vit_tiny_patch16_224"))  # fmt: skip
    assert build.shared_key(one, "data") != build.shared_key(other, "data")
