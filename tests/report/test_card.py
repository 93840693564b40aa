"""The model card says facts, and nothing that came from data is more than text in it."""

import pytest
from huggingface_hub import ModelCard
from hydra import compose, initialize_config_dir

from distill.config.overrides import CONF
from distill.config.read import plain
from distill.report import model_card
from distill.report.card import described, initial_weights

NUMBERS = {"params": 20470, "top1": 0.9, "top5": None, "nll": 0.25, "nll_after_scaling": 0.125,
           "brier": 0.5,
           "ece": 0.0625, "ece_after_scaling": 0.03125, "agreement": 0.75}  # fmt: skip


def facts(**changed):
    return {
        "temperature": 2.0, "temperature_status": "ok", "data": "digits", "teacher": "resnet50",
        "architecture": "resnet18", "epochs": {"last": 8}, "seed": 3, "command": "distill seed=3",
        "annealing": {}, "initial_weights": "random",
        "images": {"train": 897, "val": 100, "test": 800}, "versions": {"torch": "2"},
        "objective": {"terms": {"ce": {"loss": "cross_entropy", "weight": 1.0},
                                "kl": {"loss": "kl_divergence"}}, "temperature": 8, "alpha": 0.9},
        "metrics": {"student": NUMBERS, "baseline": {**NUMBERS, "top1": 0.8}}, **changed,
    }  # fmt: skip


def test_the_card_holds_the_facts_and_leaves_the_licence_open():
    text = model_card(facts(), ["one", "two"])
    card = ModelCard(text)
    assert card.data.library_name == "timm"
    assert card.data.license is None
    for words in (
        "resnet18 distilled on digits", "A student of resnet50, 20,470 parameters",
        "(2): one, two.", r"cross\_entropy × 1.0 + kl\_divergence × 1; temperature 8; α 0.9",
        "8 epochs on 897 images, seed 3", "| top-1 | 0.9000 | 0.8000 |", "| top-5 | – | – |",
        "| NLL | 0.2500 | 0.2500 |", "| NLL after temperature scaling | 0.1250 |",
        "| ECE after temperature scaling | 0.0312 |", "Divide the logits by 2.0000",
        "`distill seed=3`", "Versions: torch 2.",
    ):  # fmt: skip
        assert words in text.replace(r"\+", "+"), words


def test_remedies_are_told_where_they_are_in_use_and_only_there():
    plain = facts()["objective"]
    off = {
        **plain,
        "label_smoothing": 0.0,
        "sample_selection": {"small_loss": None, "agreement": False},
    }
    assert described(off) == described(plain)
    used = {
        **plain,
        "label_smoothing": 0.1,
        "sample_selection": {"small_loss": 0.6, "agreement": True},
    }
    told = "label smoothing 0.1; labels kept by small loss 0.6; labels kept by agreement True"
    assert described(used) == f"{described(plain)}; {told}"


def test_without_a_fit_or_a_teacher_it_says_so():
    text = model_card(
        facts(temperature=None, temperature_status="zero", teacher=None,
              metrics={"student": NUMBERS, "baseline": None}), ["one"] * 60,
    )  # fmt: skip
    assert "No temperature is applied: the fit on validation ended as zero." in text
    assert "A student of the labels alone" in text
    assert "| top-1 | 0.9000 | – |" in text
    assert "one and 10 more" in text


def test_a_term_that_is_only_the_name_of_its_loss_is_described():
    assert described({"terms": {"ce": "cross_entropy"}}) == r"cross\_entropy × 1"


def composed(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=list(overrides))


def text_of(*overrides):
    """The card of a run of this configuration, without what keeps it from being Markdown."""
    cfg = composed(*overrides)
    told = {name: plain(cfg[name]) for name in ("objective", "annealing")}
    text = model_card(facts(**told, initial_weights=initial_weights(cfg.student)), ["one", "two"])
    return text.replace("\\", "")


@pytest.mark.parametrize(
    ("overrides", "learns"),
    [
        (["objective=supervised"], False),
        (["objective=ldam_drw"], False),
        (["objective=kd"], True),
        (["objective=dkd"], True),
        (["objective=hint"], True),
        (["objective=kd", "objective.alpha=0"], False),
        (["objective=kd", "objective.alpha=0", "annealing=linear", "annealing.value=alpha"], True),
        (["objective=kd", "objective.alpha=null", "objective.terms.kl.weight=0"], False),
        (["objective=supervised", "objective.sample_selection.agreement=true"], True),
    ],
)
def test_a_teacher_is_named_where_the_student_learned_from_it(overrides, learns):
    text = text_of(*overrides)
    assert ("resnet50" in text) == learns
    assert ("distilled on digits" in text) == learns
    assert ("knowledge-distillation" in text) == learns
    assert ("agreement with the teacher" in text) == learns
    assert ("A student of the labels alone" in text) != learns


@pytest.mark.parametrize(
    ("overrides", "said", "never"),
    [
        (["annealing=cosine"], "temperature 8.0 → 1.0 (cosine)", "temperature 8.0;"),
        (["annealing=linear", "annealing.start=6", "annealing.end=2", "annealing.warmup=3"],
         "temperature 6 → 2 (linear after 3 epochs)", "temperature 8.0"),
        (["annealing=step", "annealing.value=alpha", "annealing.warmup=0.25"],
         "temperature 8.0; α 0.9 → 1.0 (step after 25% of training)", "α 0.9;"),
        (["annealing=linear", "annealing.value=terms.ce.weight", "annealing.end=0"],
         "cross_entropy × 1.0 → 0 (linear) + kl_divergence × 1.0", "cross_entropy × 1.0 +"),
        (["objective=ctkd"], "temperature learned per run, from 4.0; α 0.9; curriculum.strength "
         "0.0 → 1.0 (cosine)", "temperature 4.0"),
        (["objective=ldam_drw"], "ldam × 1.0 → 0.0 (linear after 80% of training) + ldam × 0.0 → "
         "1.0 (linear after 80% of training)", "× 1.0 +"),
        (["objective.sample_selection.small_loss=0.6"], "kept by small loss 1.0 → 0.6 (linear)",
         "sample_selection."),
        ([], "temperature 8.0; α 0.9.", "→"),
    ],
)  # fmt: skip
def test_what_moved_in_training_is_told_as_it_moved(overrides, said, never):
    text = text_of(*overrides)
    assert said in text
    assert never not in text


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], "random"),
        (["student.pretrained=true"], "published with timm"),
        (["student.checkpoint=../private/first/"], "checkpoint first"),
        (["experiment=qad", "student.checkpoint=../runs/a.ckpt"], "checkpoint a.ckpt"),
    ],
)
def test_where_the_weights_began_is_told_without_anybodys_folders(overrides, said):
    text = text_of(*overrides)
    assert f"**Initial weights**: {said}." in text
    assert "private" not in text
    assert "runs" not in text


@pytest.mark.parametrize(
    "name", ["<script>x</script>", "a|b", "[x](javascript:x)", "`x`", "a\n\n# b", "![x](y)", "*b*"]
)
def test_a_class_name_is_only_text(name):
    text = model_card(facts(data=name), [name, "two"])
    for markup in ("<script", "[x](", "`x`", "\n# b", "![", " *b*", " a|b"):
        assert markup not in text
    body = text.split("---\n", 2)[2]
    assert sum(line.startswith("# ") for line in body.splitlines()) == 1
