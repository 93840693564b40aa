"""A user's own architecture from the command line, known to timm or not."""

import json

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from distill.models.bundle import load_student, save_student

MODULE = """
import torch
from timm.models import build_model_with_cfg, register_model
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes=10, in_chans=3, width=8):
        super().__init__()
        self.num_classes, self.num_features = num_classes, width
        self.conv = nn.Conv2d(in_chans, width, 3, stride=2)
        self.fc = nn.Linear(width, num_classes)
    def get_classifier(self):
        return self.fc
    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))

default_cfgs = {"my_net": {"input_size": (3, 32, 32), "first_conv": "conv", "classifier": "fc"}}

@register_model
def my_net(pretrained=False, **kwargs):
    return build_model_with_cfg(Net, "my_net", pretrained, **kwargs)

@register_model
def my_plain_net(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None,
                 cache_dir=None, **kwargs):
    return Net(**kwargs)
"""
QUICK = ("trainer.max_epochs=1", "trainer.limit_train_batches=3", "teacher.fit.max_epochs=1",
         "baseline=false", "imports=[my_models]", "student=timm")  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "my_models.py").write_text(MODULE)
    return tmp_path


@pytest.mark.slow
def test_what_a_users_module_registers_is_known_to_runs_bundles_and_commands(command, folder):
    command("distill", *QUICK, "student.name=my_net", "student.args={width: 16}",
            "hydra.run.dir=run")  # fmt: skip
    config = json.loads((folder / "run" / "student" / "config.json").read_text())
    assert config["architecture"] == "my_net"
    assert config["model_args"]["width"] == 16
    command("distill-eval", "imports=[my_models]", "student.checkpoint=run/student",
            "hydra.run.dir=judged")  # fmt: skip
    trained, judged = (json.loads((folder / name / "summary.json").read_text())
                       for name in ("run", "judged"))  # fmt: skip
    assert judged["student"]["top1"] == trained["student"]["top1"]
    Image.new("L", (32, 32), 90).save(folder / "one.png")
    said = command("distill-predict", "--imports", "my_models", "run/student", "one.png")
    assert said.stdout.splitlines()[1].startswith("one.png,")
    refused = command("distill", *QUICK[:-2], "imports=[my_modles]", check=False)
    assert refused.returncode == 2
    assert "imports=my_modles: ModuleNotFoundError: No module named 'my_modles'" in refused.stderr


@pytest.mark.slow
def test_a_model_that_timm_cannot_save_leaves_its_weights_and_a_note(command, folder):
    done = command("distill", *QUICK, "student.name=my_plain_net", "hydra.run.dir=run")
    assert "timm cannot build this model" in done.stdout + done.stderr
    bundle = folder / "run" / "student"
    assert not (bundle / "config.json").exists()
    facts = json.loads((bundle / "distill.json").read_text())
    assert "timm cannot build" in facts["note"]
    assert load_file(bundle / "model.safetensors")["fc.weight"].shape == (10, 8)
    command("distill-eval", "imports=[my_models]", "student.checkpoint=run/student",
            "student.name=my_plain_net", "hydra.run.dir=judged")  # fmt: skip
    trained, judged = (json.loads((folder / name / "summary.json").read_text())
                       for name in ("run", "judged"))  # fmt: skip
    assert judged["student"]["nll"] == pytest.approx(trained["student"]["nll"], rel=1e-5)


def test_a_module_of_ones_own_is_saved_as_its_state_dict(tiny, tmp_path, caplog):
    model = tiny()
    save_student(model, tmp_path / "student", classes=["a", "b", "c", "d"], mean=[0.5], std=[0.5])
    assert "timm cannot build this model" in caplog.text
    found = load_file(tmp_path / "student" / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="timm cannot build this model"):
        load_student(tmp_path / "student")
    assert not timm.is_model("my_net")  # as the module of the other tests was never imported here
