"""The private names of other libraries: each is there, and means what is made of it."""

import ast
import csv
import inspect

import pytest
import pytorch_lightning as pl
import torch
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.utils import JobReturn, JobStatus
from pytorch_lightning.callbacks import EMAWeightAveraging
from pytorch_lightning.loggers import CSVLogger
from torch import nn

from distill.config import overrides
from distill.training.module import Distiller
from distill.utils import compat
from tests.conftest import ROOT

COMPAT = ROOT / "distill" / "utils" / "compat.py"


class Watch(pl.Callback):
    """What the private names say while a checkpoint is written."""

    def __init__(self, average):
        self.average, self.found = average, {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        assert not compat.epoch_is_over(trainer)
        pl_module.log("own", outputs["loss"], on_step=False, on_epoch=True, batch_size=16)
        metric = compat.epoch_results(trainer)["on_train_batch_end.own"]
        mean = float(metric.value / metric.cumulated_batch_size)
        self.found.setdefault("means", []).append(mean)
        self.found.setdefault("losses", []).append(float(outputs["losses"]["loss"]))
        assert int(metric.cumulated_batch_size) == 16 * (batch_idx + 1)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        assert compat.epoch_is_over(trainer)
        self.found["row"] = compat.epoch_row(trainer)
        self.found["averaged"] = compat.averaged_model(self.average)


@pytest.mark.filterwarnings("ignore")
def test_lightning_tells_what_an_epoch_has_logged_and_will_log(tiny, loader, tmp_path):
    average = EMAWeightAveraging(decay=0.5)
    watch = Watch(average)
    last = pl.callbacks.ModelCheckpoint(tmp_path, save_on_train_epoch_end=True)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=CSVLogger(tmp_path, name="", version=""),
        callbacks=[average, last, watch], enable_progress_bar=False, enable_model_summary=False,
        log_every_n_steps=1,
    )  # fmt: skip
    assert compat.averaged_model(average) is None
    trainer.fit(Distiller(tiny(), num_classes=4), loader())
    losses = torch.tensor(watch.found["losses"]).double()
    means = losses.cumsum(0) / torch.arange(1, len(losses) + 1)
    assert watch.found["means"] == pytest.approx(means.tolist())
    row = watch.found["row"]
    with (tmp_path / "metrics.csv").open() as file:
        (logged,) = csv.DictReader(file)
    assert {name: float(value) for name, value in logged.items()} == pytest.approx(row)
    assert row["step"] == len(losses) - 1
    assert int(watch.found["averaged"].n_averaged) > 0


def test_hydra_applies_overrides_by_our_function_and_its_own_is_kept():
    assert ConfigLoaderImpl._apply_overrides_to_config is overrides.apply
    assert [*inspect.signature(overrides.hydras_own).parameters] == ["overrides", "cfg"]


def test_hydra_keeps_what_a_job_ended_with(capsys):
    error = ValueError("no")
    for status, value in ((JobStatus.FAILED, error), (JobStatus.COMPLETED, 0.5)):
        job = JobReturn()
        job.return_value, job.status = value, status
        assert compat.returned(job) is value
    assert capsys.readouterr() == ("", "")


def test_torch_tells_what_is_compiled():
    inner, x = nn.Linear(2, 2), torch.ones(1, 2)
    wrapper = torch.compile(inner, backend="eager")
    assert compat.compiled_module(wrapper) is inner
    assert compat.compiled_module(inner) is None
    assert all(name.startswith(compat.PREFIX) for name in wrapper.state_dict())
    assert not compat.is_compiled_in_place(inner)
    compat.compile_like(wrapper, inner)
    assert compat.is_compiled_in_place(inner)
    assert torch.equal(inner(x), wrapper(x))
    other = nn.Linear(2, 2)
    other.compile(backend="eager")
    assert compat.is_compiled_in_place(other)


def test_a_table_of_the_hub_has_another_fingerprint_where_a_row_changes():
    datasets = pytest.importorskip("datasets")
    found = [compat.table_fingerprint(datasets.Dataset.from_dict({"x": x}))
             for x in ([1, 2], [1, 3], [1, 2])]  # fmt: skip
    assert found[0] != found[1]
    assert found[0] == found[2] != ""
    assert compat.table_fingerprint(None) == ""


@pytest.mark.parametrize(
    "path", sorted((ROOT / "distill").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_no_other_file_uses_a_private_name_of_a_library(path):
    if path == COMPAT:
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    own = {node.attr for node in attributes if isinstance(node.ctx, ast.Store)}
    own |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    used = {node.attr for node in attributes if node.attr.startswith("_")
            and not node.attr.startswith("__")} - own - PUBLIC  # fmt: skip
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
                for alias in node.names}  # fmt: skip
    private = {name for name in modules if "._" in name and not name.startswith("distill.")}
    assert (used - INHERITED.get(path.name, set()), private) == (set(), set())


PUBLIC = {"_target_", "_exit"}  # Hydra's key, and a function that Python documents
INHERITED = {  # from our own classes, in another file
    name: {"_add_sum", "_add_counts"} for name in ("calibration.py", "classes.py", "fidelity.py",
                                                   "ranking.py", "selective.py")
}  # fmt: skip
