"""Bundles and checkpoints from strangers: only clean errors, nothing run, nothing followed."""

import json
import os
import resource
import shutil
import struct

import pytest
import timm
import torch

import distill
from distill import save_student
from distill.models.build import ModelSpec, build_model
from distill.models.checkpoint import INTERPOLATIONS, read_checkpoint
from distill.models.weights import DataShape
from tests.fuzz import fuzz, watched

ARGS = {"layers": [1, 1, 1, 1], "channels": [4, 8, 16, 32], "stem_type": "deep", "stem_width": 4}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=3, in_chans=1, **ARGS)
    facts = {"temperature": 2.0, "vector_scaling": {"scale": [1.0] * 3, "bias": [0.0] * 3}}
    return save_student(model, tmp_path_factory.mktemp("o") / "student", classes=["a", "b", "c"],
                        input_size=(1, 32, 32), mean=[0.5], std=[0.5], facts=facts)  # fmt: skip


@pytest.fixture
def bundle(original, tmp_path):
    return shutil.copytree(original, tmp_path / "student")


def change(path, function):
    content = json.loads(path.read_text())
    function(content)
    path.write_text(json.dumps(content))


def header_of(file):
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def with_header(file, header, data):
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def swap(name, target):
    """Put a link in a file's place."""

    def do(folder):
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return do


def in_config(function):
    return lambda folder: change(folder / "config.json", function)


def in_facts(**values):
    return lambda folder: change(folder / "distill.json", lambda facts: facts.update(values))


def argument(**values):
    return in_config(lambda config: config["model_args"].update(values))


def fill(name, value):
    def do(folder):
        file = folder / "model.safetensors"
        tensors = dict(read_checkpoint(folder).weights)
        tensors[name] = torch.full_like(tensors[name], value)
        file.write_bytes(__import__("safetensors.torch").torch.save(tensors))

    return do


def fifo(folder):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


def offsets(folder):
    header, data = header_of(folder / "model.safetensors")
    header["fc.bias"]["data_offsets"] = [0, 2**60]
    with_header(folder / "model.safetensors", header, data)


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


HOSTILE = {
    "links out: weights": (swap("model.safetensors", "/etc/hostname"), "link out of its folder"),
    "links out: facts": (swap("distill.json", "/etc/passwd"), "link out of its folder"),
    "links out: config": (swap("config.json", "../../../../etc/passwd"), "not a student bundle"),
    "links in a circle": (swap("config.json", "config.json"), "leads nowhere"),
    "a pipe": (fifo, "not an ordinary file"),
    "a folder": (swap("config.json", "."), "not an ordinary file"),
    "giant header": (write("model.safetensors", b"\xff" * 7 + b"\x7f" + b"{}"), "be read safely"),
    "large header": (
        write("model.safetensors", struct.pack("<Q", 2**25) + b"{" * 2**25),
        "be read safely",
    ),
    "offsets past the end": (offsets, "be read safely"),
    "empty weights": (write("model.safetensors", b""), "be read safely"),
    "truncated weights": (cut, "be read safely"),
    "no tensors": (write("model.safetensors", struct.pack("<Q", 2) + b"{}"), "holds no weights"),
    "a pickle in disguise": (write("model.safetensors", b"PK\x03\x04" * 99), "be read safely"),
    "NaN": (fill("fc.weight", torch.nan), "fc.weight has values that are not finite"),
    "infinite": (fill("fc.bias", torch.inf), "fc.bias has values that are not finite"),
    "nested to death": (write("config.json", b"[" * 10**6), "is damaged"),
    "a giant number": (write("config.json", b'{"a": ' + b"9" * 10**5 + b"}"), "is damaged"),
    "bytes": (write("config.json", b"\xff\xfe\x00"), "is damaged"),
    "endless": (write("config.json", b" " * (2**24 + 1)), "is damaged"),
    "another list": (write("config.json", b"[]"), "does not hold an object"),
    "no name": (in_config(lambda c: c.pop("architecture")), "names no architecture"),
    "a folder for a name": (in_config(lambda c: c.update(architecture="local-dir:/")), "no arch"),
    "a hub for a name": (in_config(lambda c: c.update(architecture="hf-hub:x/y")), "no arch"),
    "a list for a name": (in_config(lambda c: c.update(architecture=["resnet18"])), "no arch"),
    "another name": (in_config(lambda c: c.update(architecture="resnet50")), "does not fit"),
    "wider": (argument(channels=[8, 8, 16, 32]), "does not fit the architecture"),
    "as deep as memory": (argument(layers=[1, 1, 1, 60_000]), "more tensors than the file"),
    "deeper than memory": (argument(layers=[1, 1, 1, 10**12]), "out of all proportion"),
    "as wide as memory": (argument(channels=[60_000] * 4), "out of all proportion"),
    "not a number": (argument(stem_width=float("nan")), "out of all proportion"),
    "weights from elsewhere": (argument(checkpoint_path="/etc/passwd"), "no argument of an arch"),
    "weights of timm's": (argument(pretrained=True), "no argument of an architecture"),
    "a filter to call": (argument(pretrained_filter_fn="os.system"), "no argument of an arch"),
    "a cache elsewhere": (argument(cache_dir="/"), "no argument of an architecture"),
    "a number without end": (argument(stem_width=10**400), "out of all proportion"),
    "a target": (argument(_target_="os.system"), "timm cannot build|no argument"),
    "arguments as a list": (in_config(lambda c: c.update(model_args=[1])), "not an object"),
    "settings as a list": (in_config(lambda c: c.update(pretrained_cfg=[1])), "not an object"),
    "size": (in_config(lambda c: c["pretrained_cfg"].update(input_size=[1, -3, 3])), "input_size"),
    "mean": (in_config(lambda c: c["pretrained_cfg"].update(mean="0.5")), "mean cannot be"),
    "std": (in_config(lambda c: c["pretrained_cfg"].update(std=[0])), "std cannot be"),
    "mean and std": (in_config(lambda c: c["pretrained_cfg"].update(std=[1, 1])), "mean and"),
    "resizing": (in_config(lambda c: c["pretrained_cfg"].update(interpolation="x")), "tion cannot"),
    "crop": (in_config(lambda c: c["pretrained_cfg"].update(crop_pct=1e9)), "crop_pct cannot"),
    "temperature in words": (in_facts(temperature="2"), "no temperature"),
    "temperature zero": (in_facts(temperature=0), "no temperature"),
    "temperature without end": (in_facts(temperature=10**400), "no temperature"),
    "temperature infinite": (in_facts(temperature=float("inf")), "no temperature"),
    "temperature true": (in_facts(temperature=True), "no temperature"),
    "a scale of words": (in_facts(vector_scaling={"scale": ["a"], "bias": [1]}), "vector_scaling"),
    "no bias": (in_facts(vector_scaling={"scale": [1.0]}), "vector_scaling"),
    "classes as numbers": (in_facts(classes=[1, 2, 3]), "classes are not a list of names"),
    "too few classes": (in_facts(classes=["a"]), "1 class names and the model has 3"),
    "too few scales": (in_facts(vector_scaling={"scale": [1.0], "bias": [0.0]}), "of 3 classes"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_bundle_ends_in_one_line(bundle, name):
    damage, message = HOSTILE[name]
    damage(bundle)
    with watched(), pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        distill.load_student(bundle, calibrated=True)
    assert len(str(caught.value).splitlines()) == 1


def test_every_interpolation_that_timm_knows_is_taken():
    assert set(timm.data.transforms._str_to_torch_interpolation) == set(INTERPOLATIONS)


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize(
    "changed", [{"channels": [4, 8, 16, 30_000]}, {"layers": [1, 1, 1, 9_999]}]
)
def test_a_run_takes_no_memory_for_what_a_bundle_boasts_of(bundle, role, changed):
    argument(**changed)(bundle)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with (
        watched(),
        pytest.raises(ValueError, match=r"of all proportion|more tensors than the file"),
    ):
        build_model(ModelSpec(checkpoint=str(bundle)), DataShape(3, 1, (32, 32)), role)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes


@pytest.mark.parametrize("ending", ["pth", "ckpt"])
@pytest.mark.parametrize("tensor", [
    torch.zeros(1).expand(2**33), torch.zeros(3, device="meta"), torch.eye(3).to_sparse(),
])  # fmt: skip
def test_a_tensor_without_its_numbers_is_refused(tmp_path, tensor, ending):
    key = "fc.weight" if ending == "pth" else "student.fc.weight"
    content = {key: tensor} if ending == "pth" else {"state_dict": {key: tensor}}
    torch.save(content, tmp_path / f"w.{ending}")
    with watched(), pytest.raises(ValueError, match="larger than what the file holds"):
        read_checkpoint(tmp_path / f"w.{ending}")


def test_a_target_in_a_bundle_is_ignored(bundle, tmp_path):
    target = {"_target_": "os.mkdir", "path": str(tmp_path / "made")}
    change(bundle / "config.json", lambda c: c.update(target, extra=target))
    change(bundle / "distill.json", lambda f: f.update(target, objective=target, annealing=target))
    with watched():
        assert distill.load_student(bundle, calibrated=True)(torch.zeros(1, 1, 32, 32)).shape
        spec = ModelSpec(checkpoint=str(bundle))
        build_model(spec, DataShape(3, 1, (32, 32)), "teacher")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": {"student.fc.weight": "a string"}},
        {"state_dict": {"student.fc.weight": torch.tensor(float("nan"))}},
        {"state_dict": ["student."]},
        {"state_dict": {"student.w": torch.ones(1)}, "distill": {"student_model": {"name": 3}}},
        {"state_dict": {"student.w": torch.ones(1)},
         "distill": {"student_model": {"name": "resnet18", "args": {"checkpoint_path": "/"}}}},
        {"state_dict": {"student.w": torch.ones(1)}, "distill": {"preprocessing": {"std": [0.0]}}},
    ],
)  # fmt: skip
def test_a_hostile_lightning_checkpoint_ends_in_one_line(tmp_path, content):
    torch.save(content, tmp_path / "last.ckpt")
    with watched(), pytest.raises(ValueError, match=r"last\.ckpt") as caught:
        read_checkpoint(tmp_path / "last.ckpt")
    assert len(str(caught.value).splitlines()) == 1


def test_damaged_bundles_load_or_end_in_one_line(bundle):
    opened = fuzz("load", bundle, 150)
    assert min(opened[True], opened[False]) > 15  # both ends are met
