"""Every loss of the table under hard numbers, narrow types and awkward tensors."""

import inspect

import pytest
import torch

from distill.losses import LOSSES
from tests.losses.loss_cases import random_batch

NEEDS_THREE_CLASSES = {"decoupled", "normalized_kd", "refined_kd", "standardized_kl"}
INDICES_ONLY = {
    "decoupled",
    "normalized_kd",
    "refined_kd",
    "one_vs_rest_hinge",
    "crammer_singer",
    "weston_watkins",
    "ldam",
    "ramp_hinge",
    "smooth_topk",
    "hard_topk_hinge",
}
WITHOUT_BATCH = {  # options that leave out what compares the examples of a batch
    "dist": {"gamma": 0.0},
    "multi_level_kd": {"beta": 0.0, "gamma": 0.0},
    "streamlined_kd": {"beta": 0.0},
}
# Functions of logits and labels; those of features, and what learns, have files of their own.
OF_LOGITS = {
    name: loss.inputs
    for name, loss in LOSSES.items()
    if "student" in loss.inputs and not loss.learns
}
WITH_TEACHER = [name for name, inputs in OF_LOGITS.items() if "teacher" in inputs]
WITH_TARGET = [name for name, inputs in OF_LOGITS.items() if "target" in inputs]
TEMPERED = [name for name in OF_LOGITS if "temperature" in LOSSES[name].options]
pytestmark = pytest.mark.filterwarnings("ignore:standardised logits")


def options_of(name, classes, **options):
    accepted = inspect.signature(LOSSES[name].function).parameters
    options |= {"class_counts": torch.arange(1, classes + 1), "k": min(5, classes - 1)}
    return {key: value for key, value in options.items() if key in accepted}


def evaluate(name, student, teacher, target, **options):
    tensors = {"student": student, "teacher": teacher, "target": target}
    function, inputs = LOSSES[name]
    options = options_of(name, student.shape[1], **options)
    return function(*(tensors[key] for key in inputs), **options)


def hard_logits(classes, rows=4):
    """Pairs of student and teacher logits at the ends of the range the losses promise."""
    generator = torch.Generator().manual_seed(classes)

    def noise(scale):
        return scale * torch.randn(rows, classes, generator=generator).clamp(-1, 1)

    first, second = (torch.full((rows, classes), -1e4) for _ in range(2))
    first[:, 0], second[:, 1] = 1e4, 1e4
    constant = torch.full((rows, classes), 3.7)
    same = noise(5.0)
    return {
        "ordinary": (noise(1.0), noise(1.0)),
        "wide": (noise(1e4), noise(1e4)),
        "opposed": (first, second),
        "both constant": (constant, -constant),
        "student constant": (torch.full((rows, classes), 1e4), noise(1.0)),
        "teacher constant": (noise(1e4), torch.full((rows, classes), -1e4)),
        "equal": (same, same.clone()),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [2, 3, 50_000])
@pytest.mark.parametrize("name", OF_LOGITS)
def test_values_and_gradients_are_finite(name, classes, dtype):
    if classes == 2 and name in NEEDS_THREE_CLASSES:
        pytest.skip("refuses two classes")
    if classes == 50_000 and name == "pairwise_soft_hinge":
        pytest.skip("exempt at 50,000 classes")
    target = torch.tensor([0, 1, 0, classes - 1])
    for label, (student, teacher) in hard_logits(classes).items():
        for temperature in (0.05, 1.0, 1000.0) if name in TEMPERED else (1.0,):
            if name == "dist" and dtype == torch.float16 and temperature == 1000.0:
                continue  # its gradient grows with T²: 1e6 is right, and no float16
            leaf = student.to(dtype).requires_grad_()
            with torch.autocast("cpu", torch.bfloat16 if dtype == torch.float32 else dtype):
                loss = evaluate(name, leaf, teacher.to(dtype), target, temperature=temperature)
                loss.mean().backward()
            case = f"{label}, T = {temperature}"
            assert loss.shape == (4,), case
            assert loss.dtype == torch.float32, case
            assert loss.isfinite().all(), case
            assert (loss >= 0).all(), case
            assert leaf.grad.isfinite().all(), case


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OF_LOGITS)
def test_autocast_changes_no_digit(name, dtype):
    student, teacher, target = random_batch(classes=12)
    student, teacher = student.to(dtype), teacher.to(dtype)
    expected = evaluate(name, student.float(), teacher.float(), target, temperature=2.0)
    with torch.autocast("cpu", dtype):
        narrow = evaluate(name, student, teacher, target, temperature=2.0)
        wide = evaluate(name, student.float(), teacher.float(), target, temperature=2.0)
    assert torch.equal(narrow, expected)
    assert torch.equal(wide, expected)


@pytest.mark.parametrize("name", OF_LOGITS)
def test_float64_stays_float64(name):
    batch = random_batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss = evaluate(name, *batch)
    assert loss.dtype == torch.float64
    assert loss.shape == (6,)
    assert not torch.equal(loss, loss.float().double())


@pytest.mark.parametrize("name", OF_LOGITS)
def test_an_example_does_not_depend_on_its_batch(name):
    batch = random_batch()
    options = dict(WITHOUT_BATCH.get(name, {}))
    inputs = inspect.signature(LOSSES[name].function).parameters
    options |= options_of(name, 7)
    tensors = dict(zip(("student", "teacher", "target"), batch, strict=True))
    together = LOSSES[name].function(*(tensors[k] for k in LOSSES[name].inputs), **options)
    for i in range(6):
        alone = LOSSES[name].function(
            *(tensors[k][i : i + 1] for k in LOSSES[name].inputs), **options
        )
        torch.testing.assert_close(alone, together[i : i + 1])
    assert "reduction" not in inputs


@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", WITH_TEACHER)
def test_a_teacher_from_inference_mode_is_accepted(name, dtype, per_example):
    student, teacher, target = random_batch(classes=12)
    options = {}
    if name in TEMPERED:
        shape = (6, 1) if per_example else ()
        options["temperature"] = torch.full(shape, 2.0, requires_grad=True)
    leaf = student.to(dtype).requires_grad_()
    evaluate(name, leaf, teacher.to(dtype), target, **options).sum().backward()
    expected, leaf.grad = leaf.grad, None
    with torch.inference_mode():
        frozen = teacher.to(dtype).clone()
    assert frozen.is_inference()
    evaluate(name, leaf, frozen, target, **options).sum().backward()
    assert torch.equal(leaf.grad, expected)
    if options:
        assert options["temperature"].grad.isfinite().all()
        assert options["temperature"].grad.shape == shape


@pytest.mark.parametrize("name", OF_LOGITS)
def test_everything_works_inside_inference_mode(name):
    expected = evaluate(name, *random_batch())
    with torch.inference_mode():
        assert torch.equal(evaluate(name, *random_batch()), expected)


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_no_gradient_reaches_the_teacher(name):
    student, teacher, target = random_batch()
    student.requires_grad_(), teacher.requires_grad_()
    evaluate(name, student, teacher, target).sum().backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("name", OF_LOGITS)
def test_no_value_is_read_on_the_way(name):
    """On the meta device there are no values: reading one raises."""
    student, teacher, target = (t.to("meta") for t in random_batch())
    options = {"class_counts": torch.empty(7, device="meta")}
    options["temperature"] = torch.empty((), device="meta")
    tensors = {"student": student, "teacher": teacher, "target": target}
    function, inputs = LOSSES[name]
    options = {k: v for k, v in options.items() if k in inspect.signature(function).parameters}
    assert function(*(tensors[key] for key in inputs), **options).shape == (6,)


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_logits_of_another_shape_are_refused(name):
    student, teacher, target = random_batch()
    with pytest.raises(ValueError, match=r"student \[6, 7\], teacher \[6, 6\]"):
        evaluate(name, student, teacher[:, :6], target)


@pytest.mark.parametrize("name", OF_LOGITS)
def test_student_logits_must_be_a_floating_matrix(name):
    student, teacher, target = random_batch()
    for wrong in (student[0], student.long()):
        with pytest.raises(ValueError, match="logits"):
            LOSSES[name].function(
                wrong,
                *[{"teacher": teacher, "target": target}[k] for k in LOSSES[name].inputs[1:]],
                **options_of(name, 7),
            )


@pytest.mark.parametrize("name", WITH_TARGET)
def test_targets_that_do_not_fit_are_refused(name):
    student, teacher, target = random_batch()
    with pytest.raises(ValueError, match="one label per example"):
        evaluate(name, student, teacher, target[:4])
    with pytest.raises(ValueError, match="class indices"):
        evaluate(name, student, teacher, target > 2)
    mixed = torch.softmax(teacher, 1)
    if name in INDICES_ONLY:
        with pytest.raises(ValueError, match="class indices"):
            evaluate(name, student, teacher, mixed)
    else:
        assert evaluate(name, student, teacher, mixed).shape == (6,)
        with pytest.raises(ValueError, match="target probabilities"):
            evaluate(name, student, teacher, mixed[:, :3])


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
@pytest.mark.parametrize("name", WITH_TARGET)
def test_labels_of_any_integer_type_will_do(name, dtype):
    student, teacher, target = random_batch()
    expected = evaluate(name, student, teacher, target)
    assert torch.equal(evaluate(name, student, teacher, target.to(dtype)), expected)
