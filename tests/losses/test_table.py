"""The table of losses, the contract it keeps, and the examples of its functions."""

import doctest
import importlib
import inspect
import subprocess
import sys

import pytest

import distill.losses
from distill.losses import LOSSES

MODULES = ["soft", "transformed", "label_aware", "batchwise", "transport", "hinge", "balanced",
           "robust", "topk"]  # fmt: skip
TENSORS = ("student", "teacher", "target")
TAU = ("temperature", 1.0)
CENTRED = ("target", "centred")
# Options and defaults after the tensors; ... has no default.
CONTRACT = {
    "kl_divergence": ("student teacher", [TAU]),
    "soft_cross_entropy": ("student teacher", [TAU]),
    "hard_cross_entropy": ("student teacher", []),
    "logit_mse": ("student teacher", [("centred", True)]),
    "standardized_kl": ("student teacher", [TAU]),
    "decoupled": ("student teacher target", [("alpha", 1.0), ("beta", 8.0), TAU]),
    "dist": ("student teacher", [("beta", 1.0), ("gamma", 1.0), TAU]),
    "normalized_kd": ("student teacher target", [("gamma", 3.5), TAU]),
    "refined_kd": (
        "student teacher target",
        [("alpha", 1.0), ("beta", 8.0), ("confidence_temperature", 1.0), TAU],
    ),
    "transformed_teacher": ("student teacher", [TAU]),
    "weighted_transformed_teacher": ("student teacher", [TAU]),
    "entropy_weighted_kl": ("student teacher", [("entropy_temperature", 3.0), TAU]),
    "multi_level_kd": (
        "student teacher",
        [("beta", 1.0), ("gamma", 1.0), ("spread", (0.5, 0.75, 1.0, 1.25, 1.5)), TAU],
    ),
    "streamlined_kd": ("student teacher", [("beta", 1.0), ("regularization", 0.1), TAU]),
    "soft_hinge": ("student teacher", [CENTRED, TAU]),
    "squared_soft_hinge": ("student teacher", [CENTRED, TAU]),
    "weighted_sign_hinge": ("student teacher", [CENTRED, TAU]),
    "product_hinge": ("student teacher", [CENTRED, TAU]),
    "epsilon_insensitive_hinge": ("student teacher", [("epsilon", 0.0), CENTRED, TAU]),
    "pairwise_soft_hinge": ("student teacher", [("margin", 1.0), TAU]),
    "cross_entropy": ("student target", [("label_smoothing", 0.0)]),
    "tempered_cross_entropy": ("student target", [TAU]),
    "one_vs_rest_hinge": ("student target", []),
    "crammer_singer": ("student target", []),
    "weston_watkins": ("student target", []),
    "class_balanced_cross_entropy": ("student target", [("class_counts", ...), ("beta", 0.9999)]),
    "ldam": (
        "student target",
        [("class_counts", ...), ("max_margin", 0.5), ("scale", 30.0), ("hinge", False)],
    ),
    "logit_adjusted_cross_entropy": ("student target", [("class_counts", ...), ("tau", 1.0)]),
    "generalized_cross_entropy": ("student target", [("q", 0.7)]),
    "symmetric_cross_entropy": ("student target", [("alpha", 0.1), ("beta", 1.0)]),
    "ramp_hinge": ("student target", [("a", -1.0)]),
    "smooth_topk": ("student target", [("k", 5), ("tau", 1.0), ("alpha", 1.0)]),
    "hard_topk_hinge": ("student target", [("k", 5), ("alpha", 1.0)]),
}


def public_functions(module_name):
    module = importlib.import_module(f"distill.losses.{module_name}")
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value)
        and value.__module__ == module.__name__
        and not name.startswith("_")
    }


def test_the_table_holds_the_contract_and_nothing_else():
    logits = {"student", "teacher", "target"}
    others = {n for n, loss in LOSSES.items() if loss.learns or not logits.issuperset(loss.inputs)}
    assert set(LOSSES) == {*CONTRACT, *others}  # those of features have files of their own


@pytest.mark.parametrize("name", CONTRACT)
def test_names_tensors_options_and_defaults(name):
    tensors, options = CONTRACT[name]
    loss = LOSSES[name]
    assert loss.function is getattr(distill.losses, name)
    assert loss.inputs == tuple(tensors.split())
    assert list(loss.inputs) == [t for t in TENSORS if t in loss.inputs]
    parameters = list(inspect.signature(loss.function).parameters.values())
    count = len(loss.inputs)
    assert [p.name for p in parameters[:count]] == list(loss.inputs)
    assert [
        (p.name, ... if p.default is p.empty else p.default) for p in parameters[count:]
    ] == options


@pytest.mark.parametrize("module_name", MODULES)
def test_every_public_function_is_exported_and_documented(module_name):
    for name, function in public_functions(module_name).items():
        assert getattr(distill.losses, name) is function
        assert name in distill.losses.__all__
        for part in ("Args:", "Returns:", "Example:", ">>> "):
            assert part in function.__doc__, f"{name} lacks {part}"


@pytest.mark.parametrize("module_name", MODULES)
def test_the_examples_run(module_name):
    module = importlib.import_module(f"distill.losses.{module_name}")
    results = doctest.testmod(module)
    assert results.failed == 0
    assert results.attempted >= len(public_functions(module_name))


def test_losses_know_no_framework():
    program = (
        "import sys, distill.losses\n"
        "frameworks = {'lightning', 'pytorch_lightning', 'hydra', 'timm'}\n"
        "print(sorted(frameworks & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"
