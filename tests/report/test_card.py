"""The model card says facts, and nothing that came from data is more than text in it."""

import pytest
from huggingface_hub import ModelCard

from distill.report import model_card
from distill.report.card import described

NUMBERS = {"params": 20470, "top1": 0.9, "top5": None, "nll": 0.25, "nll_after_scaling": 0.125,
           "brier": 0.5,
           "ece": 0.0625, "ece_after_scaling": 0.03125, "agreement": 0.75}  # fmt: skip


def facts(**changed):
    return {
        "temperature": 2.0, "temperature_status": "ok", "data": "digits", "teacher": "resnet50",
        "architecture": "resnet18", "epochs": {"last": 8}, "seed": 3, "command": "distill seed=3",
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
    off = {**plain, "label_smoothing": 0.0, "keep": {"small_loss": None, "agreement": False}}
    assert described(off) == described(plain)
    used = {**plain, "label_smoothing": 0.1, "keep": {"small_loss": 0.6, "agreement": True}}
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


@pytest.mark.parametrize(
    "name", ["<script>x</script>", "a|b", "[x](javascript:x)", "`x`", "a\n\n# b", "![x](y)", "*b*"]
)
def test_a_class_name_is_only_text(name):
    text = model_card(facts(data=name), [name, "two"])
    for markup in ("<script", "[x](", "`x`", "\n# b", "![", " *b*", " a|b"):
        assert markup not in text
    body = text.split("---\n", 2)[2]
    assert sum(line.startswith("# ") for line in body.splitlines()) == 1
