"""Remedies for hard data: any two together, and training without labels."""

from itertools import combinations

import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from distill import Distiller, Objective
from distill.config import build, checks
from distill.config.overrides import CONF
from distill.data import DataModule
from distill.data.sources.splits import Resident, Source
from distill.losses import LOSSES, ModelInfo
from distill.models.features import Features
from distill.training import auxiliary, cache
from distill.training.trainer import schedules

HARD = "objective.terms.ce.loss="
REMEDIES = {
    "balance": ["data.balance=0.5"],
    "smoothing": ["objective.label_smoothing=0.1"],
    "small loss": ["objective.sample_selection.small_loss=0.6"],
    "agreement": ["objective.sample_selection.agreement=true"],
    "likely labels": ["objective.sample_selection.agreement=0.2"],
    "teacher only": ["objective.alpha=1"],
    "weights": ["objective.terms.ce.reweight=0.99"],
    "logit adjustment": [HARD + "logit_adjusted_cross_entropy"],
    "gce": [HARD + "generalized_cross_entropy"],
    "ldam": [HARD + "ldam"],
    "noise": ["data.condition.noise=symmetric", "data.condition.rate=0.4"],
    "tail": ["data.condition.tail=exponential", "data.condition.imbalance=4"],
}
SOFT = sorted(
    path.stem for path in (CONF / "objective").glob("*.yaml")
    if OmegaConf.load(path).alpha is not None or "kl:" in path.read_text()
    or path.stem in ("dist", "attention_transfer")
)  # fmt: skip


def compares_at_labels(name):
    """Whether a term of an objective reads the teacher's answer and the label both."""
    terms = OmegaConf.load(CONF / "objective" / f"{name}.yaml").terms.values()
    inputs = [LOSSES[term.loss].inputs for term in terms]
    return any("target" in one and any(n.startswith("teacher") for n in one) for one in inputs)


@pytest.fixture(scope="module")
def default():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", overrides=["paths.output_dir=unused"])
    OmegaConf.set_struct(cfg, False)
    return cfg


def toy(**options):
    images = torch.randint(0, 256, (96, 1, 8, 8), generator=torch.Generator().manual_seed(1))
    split = Resident(images.to(torch.uint8), torch.arange(96) % 4)
    parts = [split.subset(torch.arange(k, 96, 3)) for k in range(3)]
    source = Source("random", list("abcd"), 1, *parts)
    return DataModule(source, {"pad": 1}, batch_size=8, **options)


@pytest.mark.parametrize("pair", list(combinations(REMEDIES, 2)), ids=" and ".join)
def test_any_two_remedies_compose_or_are_refused_in_one_line(default, tiny, pair):
    own = [override for name in pair for override in REMEDIES[name]]
    cfg = OmegaConf.merge(default, {"data": {"condition": {}}}, OmegaConf.from_dotlist(own))
    condition = {k: v for k, v in cfg.data.condition.items() if k in ("noise", "rate", "tail",
                 "imbalance")}  # fmt: skip
    data = toy(balance=cfg.data.balance, condition=condition)
    objective = build.build_objective(cfg, data)
    if set(pair) == {"smoothing", "ldam"}:
        with pytest.raises(ValueError, match=r"terms\.ce cannot be smoothed \(.*\)$"):
            checks.check_objective(cfg, data, objective)
        return
    checks.check_objective(cfg, data, objective)
    torch.manual_seed(0)
    student, teacher = tiny(), tiny(width=16).eval()
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    losses = objective(student(batch.view), teacher(batch.view).detach(), batch.target)
    losses["loss"].backward()
    gradients = [parameter.grad for parameter in student.parameters()]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients)
    selecting = {"small loss", "agreement", "likely labels"} & set(pair)
    assert ("kept" in losses) == bool(selecting)


def test_small_losses_are_kept_as_co_teaching_says(default):
    cfg = OmegaConf.merge(default, {"objective": {
        "sample_selection": {"small_loss": 0.6},
        "schedules": {"sample_selection": {"duration": 4}}}})  # fmt: skip
    objective = build.build_objective(cfg, toy())
    (annealing,) = schedules(cfg, objective)
    shares = [annealing.at(epoch, 8) for epoch in range(8)]
    assert shares == pytest.approx([1 - 0.4 * min(epoch / 4, 1) for epoch in range(8)])
    assert schedules(default, build.build_objective(default, toy())) == []


def test_models_that_were_trained_on_another_balance_are_not_taken_from_the_cache(default):
    alone = auxiliary.supervised_config(default, "baseline")
    assert cache.fit_key(alone, toy(balance=0.5)) != cache.fit_key(alone, toy())
    assert alone.objective == auxiliary.SUPERVISED


# Without labels


@pytest.mark.filterwarnings("ignore:.*standardised logits")
@pytest.mark.parametrize("name", [name for name in SOFT if not compares_at_labels(name)])
def test_at_alpha_one_no_label_reaches_the_student(default, name):
    cfg = default.copy()
    cfg.objective = {**OmegaConf.load(CONF / "objective" / f"{name}.yaml"), "alpha": 1.0}
    data = toy()
    objective = build.build_objective(cfg, data)
    checks.check_objective(cfg, data, objective)
    generator = torch.Generator().manual_seed(0)
    info = ModelInfo((2,) * len(objective.stages), 3, 4, torch.nn.Linear(3, 4))
    objective.helpers.make(info, info)
    logits, teacher = torch.randn(2, 8, 4, generator=generator)
    maps = torch.randn(2, len(objective.stages), 8, 2, 3, 3, generator=generator)
    embeddings = torch.randn(2, 8, 3, generator=generator)

    def gradients(target):
        student, *own = (x.clone().requires_grad_() for x in (logits, maps[0], embeddings[0]))
        both = (
            Features([*own[0]], own[1], student),
            Features([*maps[1]], embeddings[1], teacher),
        )
        objective(student, teacher, target, both)["loss"].backward()
        gradients = [x.grad for x in (student, *own)]
        return [g.numpy().tobytes() for g in gradients if g is not None]

    target = torch.arange(8) % 4
    assert gradients(target) == gradients(target.flip(0))
    assert any(any(part) for part in gradients(target))


def test_permuted_labels_change_no_byte_of_a_student_that_learns_from_the_teacher_alone(
    tiny, tmp_path
):
    def student(alpha, **condition):
        data = toy(condition={"clean_validation": True, **condition})
        torch.manual_seed(0)
        module = Distiller(tiny(), tiny(width=16), Objective(
            {"ce": "cross_entropy", "kl": "kl_divergence"}, 4.0, alpha), topk=(1,))  # fmt: skip
        pl.seed_everything(0, verbose=False)
        pl.Trainer(
            accelerator="cpu", max_steps=2, limit_val_batches=0, logger=False,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
            use_distributed_sampler=False,
            default_root_dir=tmp_path,
        ).fit(module, datamodule=data)  # fmt: skip
        return data.train.labels, [
            v.numpy().tobytes() for v in module.student.state_dict().values()
        ]

    wrong = {"noise": "symmetric", "rate": 0.5}
    (labels, weights), (others, same) = student(1.0), student(1.0, **wrong)
    assert not torch.equal(labels, others)
    assert same == weights
    assert student(0.9)[1] != student(0.9, **wrong)[1]
