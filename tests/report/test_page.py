"""Pages made from a run's files; whatever comes from data is shown, never interpreted."""

import json
import math
import re
import shutil
from html.parser import HTMLParser
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn

from distill import report, run
from distill.config.overrides import CONF
from distill.metrics.cost import FEWEST, costs_of_models, flops, forward_seconds, model_costs
from distill.report import figures, page
from distill.report.page import brief
from distill.report.reading import read_images, read_run, temperature_of
from distill.utils.run_folder import by_epoch
from tests.fuzz import fuzz

SECTIONS = ("headline", "confidence", "fidelity", "mistakes", "selective", "learning", "cost",
            "made")  # fmt: skip
QUICK = ("trainer.max_epochs=2", "trainer.limit_train_batches=4", "teacher.fit.max_epochs=1",
         "trainer.accelerator=cpu", "logger=none")  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("run")
    costs = folder / "costs.csv"
    rows = [
        ",".join("0" if i == j else "9" if i == 3 else "1" for j in range(10)) for i in range(10)
    ]
    costs.write_text("\n".join(rows))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", overrides=[
            f"paths.output_dir={folder / 'run'}", f"paths.cache={cache}", *QUICK,
            "annealing=cosine", "annealing.unit=step", f"decision.costs={costs}",
            "objective.temperature=auto", "decision.confidence=0.5",
        ])  # fmt: skip
    try:
        run.train(cfg)
    except ValueError as error:  # a teacher of one epoch may have no best temperature
        pytest.fail(str(error))
    return folder / "run"


@pytest.fixture
def copied(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def edit(folder, change):
    path = folder / "summary.json"
    summary = json.loads(path.read_text())
    change(summary)
    path.write_text(json.dumps(summary))
    return report.write_run_page(folder).read_text()


def test_the_page_has_every_section_and_its_numbers(finished):
    text = (finished / "report.html").read_text()
    summary = json.loads((finished / "summary.json").read_text())
    for name in SECTIONS:
        assert f'<section id="{name}">' in text, name
    for role in ("teacher", "baseline", "student"):
        assert f"{100 * summary[role]['top1']:.2f}" in text
        assert f"{summary[role]['nll']:.4f}" in text
        assert f"{summary[role]['cost_after_scaling']:.4f}" in text
    assert "objective.temperature" not in text or "auto" not in text.split("<pre>")[-1]
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "https://" not in text


def test_the_page_is_made_from_files_alone_and_is_the_same_again(copied):
    before = (copied / "report.html").read_bytes()
    (copied / "report.html").unlink()
    assert report.write_run_page(copied).read_bytes() == before
    shutil.rmtree(copied / "student")
    (copied / "examples.npz").unlink()
    (copied / "metrics.csv").unlink()
    text = report.write_run_page(copied).read_text()
    assert '<section id="learning">' not in text
    assert '<section id="confidence">' in text


def test_auto_trains_at_the_teachers_own_temperature(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["config"]["objective"]["temperature"] == pytest.approx(
        summary["teacher"]["temperature_star"], rel=1e-6
    )


def test_everything_on_the_page_is_in_files(finished):
    summary = json.loads((finished / "summary.json").read_text())
    arrays = np.load(finished / "predictions.npz")
    sizes = summary["images"]
    for split in ("val", "test"):
        for role in ("student", "teacher", "baseline", "student_best"):
            assert arrays[f"{split}_{role}"].shape == (sizes[split], 10)
        assert arrays[f"{split}_target"].shape == arrays[f"{split}_index"].shape
    right = arrays["test_student"].argmax(1) == arrays["test_target"]
    assert right.mean() == pytest.approx(summary["student"]["top1"])
    assert set(summary["evidence"]["models"]) == {"student", "teacher", "baseline"}
    for role in ("student", "teacher", "baseline"):
        for name in ("params", "flops", "latency_ms", "images_per_second", "file_bytes"):
            assert summary[role][name] > 0
    assert summary["student"]["file_bytes"] == pytest.approx(
        (finished / "student" / "model.safetensors").stat().st_size, rel=0.01
    )


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(144, 2)

    def forward(self, images):
        return self.head(self.conv(images).flatten(1))


def test_counting_flops_leaves_a_model_and_those_after_it_compiled():
    called = []

    def backend(graph, inputs):
        return lambda *inputs: called.append(len(called)) or graph.forward(*inputs)

    for batch in (4, 3):
        model = Small()
        model.compile(backend=backend)
        assert flops(model, (3, 8, 8)) == flops(Small(), (3, 8, 8)) > 0
        before = len(called)
        model(torch.zeros(batch, 3, 8, 8))
        assert len(called) == before + 1


def test_the_flops_are_those_of_the_layers():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 36, 5))
    found = model_costs(model, (3, 6, 6), torch.device("cpu"))
    assert found["flops"] == 2 * (36 * 8 * 3 * 9 + 8 * 36 * 5)
    assert model.training


class Counted(Small):
    """A model that tells a list whenever it is asked for several images."""

    def __init__(self, name, calls, width=144):
        super().__init__()
        self.head = nn.Linear(width, 2)
        self.name, self.calls = name, calls

    def forward(self, images):
        if len(images) > 1:
            self.calls.append(self.name)
        return self.head(self.conv(images).flatten(1)[:, : self.head.in_features])


def test_an_architecture_is_measured_once_and_others_in_turns(monkeypatch):
    monkeypatch.setattr("distill.metrics.cost._measured", {})
    calls, device = [], torch.device("cpu")
    models = {"a": Counted("a", calls), "twin": Counted("twin", calls),
              "b": Counted("b", calls, width=9)}  # fmt: skip
    found = costs_of_models(models, (3, 8, 8), device)
    assert calls[:4] == ["a", "b"] * 2
    assert calls.count("a") == calls.count("b")
    assert "twin" not in calls
    assert found["a"] == found["twin"]
    assert found["a"]["flops"] > found["b"]["flops"]
    for name in ("latency_ms", "images_per_second"):
        low, high = found["a"][f"{name}_quartiles"]
        assert 0 < low <= found["a"][name] <= high
    before = len(calls)
    assert model_costs(models["twin"], (3, 8, 8), device) == found["a"]
    assert len(calls) == before
    model_costs(models["b"].double(), (3, 8, 8), device)  # of another precision
    assert len(calls) > before


def test_a_slow_model_is_not_asked_more_often_than_needed(monkeypatch):
    monkeypatch.setattr("distill.metrics.cost.PATIENCE", 0.0)
    seconds = forward_seconds({"a": Small()}, (3, 8, 8), 2)
    assert len(seconds["a"]) == FEWEST


def test_differences_and_classes_are_on_the_page(finished):
    text = (finished / "report.html").read_text()
    summary = json.loads((finished / "summary.json").read_text())
    found = summary["comparisons"]["baseline"]["differences"]["nll"]
    shown = f"{found['value']:+.4f}".replace("-", "−")
    ends = " to ".join(f"{end:+.4f}".replace("-", "−") for end in found["interval"])
    assert f"{shown}<small>{ends}</small>" in text
    section = text.split("Class by class")[1].split("</section>")[0]
    for name, count in zip(summary["classes"], summary["majority"]["counts"], strict=True):
        assert f'<th scope="row" class="name">{name}</th><td>{count}</td>' in section
    low, high = summary["student"]["intervals"]["top1"]
    assert f"(95 %: {100 * low:.1f} to {100 * high:.1f})" in text


def test_unbalanced_classes_and_a_student_of_one_answer_are_at_the_top(copied):
    def change(summary):
        summary["majority"] |= {"counts": [90, *[10] * 9], "class": "<zero>", "share": 0.5}
        favourite = {"label": 3, "share": 0.99, "share_of_others": 0.98}
        summary["student"]["favourite"] = favourite

    top = edit(copied, change).split("<nav")[0]
    assert "always answering “&lt;zero&gt;”, the most frequent class, would be right in 50.0" in top
    assert "The student answers almost only one class: “3” for 99.0" in top


def test_a_summary_of_an_earlier_version_has_a_page_without_what_it_lacks(copied):
    def change(summary):
        for name in ("comparisons", "majority"):
            del summary[name]
        for role in ("student", "teacher", "baseline", "student_best"):
            for name in ("intervals", "macro_f1", "favourite", "latency_ms_quartiles",
                         "images_per_second_quartiles"):  # fmt: skip
                summary[role].pop(name, None)

    text = edit(copied, change)
    for name in SECTIONS:
        assert f'<section id="{name}">' in text, name
    assert "<small>" not in text
    assert "told apart" not in text
    assert "Class by class" not in text


def test_an_earlier_baseline_and_foreign_images_are_not_shown(copied):
    def change(summary):
        summary["baseline"] = None
        del summary["evidence"]["models"]["baseline"]
        summary["evidence"]["examples"] = summary["evidence"]["examples"][:2]

    text = edit(copied, change)
    assert "without teacher" not in text.split('<section id="learning">')[1].split("</section>")[0]
    assert "<img" not in text
    assert "the same class on every test image" not in text


class Tags(HTMLParser):
    """The elements of a page, with the names of their attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.add((tag, *sorted(name for name, _ in attributes)))


def marked(value, evil):
    """Return a value of which every text that decides nothing has markup in it."""
    if isinstance(value, dict):
        return {key: marked(item, evil) for key, item in value.items()}
    if isinstance(value, list):
        return [marked(item, evil) for item in value]
    return value + evil if isinstance(value, str) and value not in ("ok", "zero") else value


def test_markup_from_data_is_shown_and_not_interpreted(copied):
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&$x_{$]]></svg>"
    tags = Tags((copied / "report.html").read_text()).found

    def change(summary):
        summary["config"]["objective"]["terms"][f"a{evil}"] = evil
        summary["versions"][evil] = "1"
        summary.update(marked(summary, evil))

    text = edit(copied, change)
    assert Tags(text).found == tags  # no element, and no attribute of one, that is not ours
    assert text.count("<script>") == 1
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 20
    assert text.count("${") == 0


def test_an_archive_that_unpacks_beyond_measure_is_refused(copied):
    with ZipFile(copied / "examples.npz", "w", ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", bytes(2**27))
    with pytest.raises(ValueError, match=r"examples\.npz is damaged: it unpacks to 134,217,728"):
        report.write_run_page(copied)


def test_damaged_runs_end_as_a_page_or_in_one_line(copied):
    for name in ("student", "checkpoints", "teacher"):
        shutil.rmtree(copied / name, ignore_errors=True)
    opened = fuzz("report", copied, 40)
    assert min(opened[True], opened[False]) > 1


def test_zeros_are_shown_layer_by_layer_where_there_are_any(finished, copied):
    assert 'id="sparsity"' not in (finished / "report.html").read_text()
    layers = [{"name": "a<b>.conv", "weights": 4000, "zeros": 1000},
              {"name": "fc", "weights": 1000, "zeros": 0}]  # fmt: skip
    found = {"layers": layers, "weights": 5000, "zeros": 1000, "removed": None, "reason": "why <b>"}
    text = edit(copied, lambda summary: summary.update(sparsity=found))
    section = text.split('<section id="sparsity">')[1].split("</section>")[0]
    assert 'href="#sparsity"' in text
    assert "20.0 % of the weights" in section
    assert "Why &lt;b&gt;." in section
    assert ">a&lt;b&gt;.conv</th><td>4,000</td><td>1,000</td>" in section
    assert 'style="--share: 0.2500">25.0</td>' in section
    costs = {key: {"before": 2e6, "after": 5e5} for key in ("params", "flops", "latency_ms")}
    removed = {"widths": {"layer<1>": [64, 17]}, **costs}
    found |= {"removed": removed, "reason": None}
    text = edit(copied, lambda summary: summary.update(sparsity=found))
    assert "width of layer&lt;1&gt;</th><td>64</td><td>17</td>" in text
    assert "<td>2 M</td><td>500 k</td>" in text
    assert "Why" not in text
    found |= {"zeros": 0, "removed": None, "reason": "none"}
    assert 'id="sparsity"' not in edit(copied, lambda summary: summary.update(sparsity=found))


def test_the_policy_allows_our_script_and_nothing_else(finished):
    text = (finished / "report.html").read_text()
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', text)
    assert policy.replace("&#39;", "'").startswith("default-src 'none'")
    assert "unsafe-eval" not in policy
    assert re.search(r"script-src &#39;sha256-[^&]+&#39;$", policy)


def test_a_page_of_many_classes_lists_the_worst_pairs(copied):
    def change(summary):
        summary["evidence"]["confusion"] = {"matrix": None, "pairs": [[3, 4, 17]]}

    text = edit(copied, change)
    assert 'class="confusion"' not in text
    assert "<td>17</td>" in text


def test_no_temperature_is_named_with_its_reason(copied):
    def change(summary):
        summary["student"] |= {"temperature_star": None, "temperature_status": "zero"}
        summary["evidence"]["models"]["student"]["reliability_after_scaling"] = None

    assert "ended as “zero”" in edit(copied, change)


@pytest.mark.parametrize("damage", [
    "{", "[]", "{}", '{"student": {}, "evidence": {}}', '{"student": null, "epochs": 3}',
])  # fmt: skip
def test_a_damaged_summary_is_one_error(copied, damage):
    (copied / "summary.json").write_text(damage)
    with pytest.raises(ValueError, match=r"summary\.json"):
        report.write_run_page(copied)


def test_images_are_never_unpickled(tmp_path):
    np.savez(tmp_path / "x.npz", images=np.array([object()], dtype=object))
    with pytest.raises(ValueError, match="damaged"):
        read_images(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", images=np.zeros((1, 4, 4, 2), np.uint8))
    with pytest.raises(ValueError, match="does not hold images"):
        read_images(tmp_path / "x.npz")


def test_the_temperature_is_drawn_as_it_was_annealed(finished):
    found = read_run(finished)
    places, values = temperature_of(found)
    start = found.summary["config"]["objective"]["temperature"]
    assert values[0] == pytest.approx(start)
    assert values[-1] == pytest.approx(1.0)
    assert places[0] == 0
    assert places[-1] <= 2
    epochs, top1 = by_epoch(found.history, "val/top1")
    assert epochs == [1, 2]
    assert top1[-1] == pytest.approx(found.summary["validation"]["top1"])


def test_the_baselines_history_comes_with_the_cached_baseline(finished, cache):
    assert by_epoch(read_run(finished).baseline_history, "val/top1")[0] == [1, 2]


def test_a_drawing_takes_the_pages_colours_and_keeps_its_text():
    points = [(1.0, 0.5, 0.1, 2), (4.0, 0.6, 0.0, 1)]
    figure = figures.over_axis("top1", "T", {"a <b> $x$": points, "c": points}, 0.4)
    assert "var(--student)" in figure.svg
    assert "#0102" not in figure.svg
    assert "a &lt;b&gt; $x$" in figure.svg
    assert "<image" not in figure.svg  # vector all through
    assert "50" in figure.alternative
    assert "over 2 seeds" in figure.alternative
    assert "over 1" not in figure.alternative


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0 B"), (999, "999 B"), (1234567, "1.23 MB"), (2.5e9, "2.5 GB")]
)
def test_amounts(value, shown):
    assert page.amount(value, "B") == shown


def test_numbers_have_no_negative_zero_and_missing_ones_are_dashes():
    assert page.number(-1e-9) == "0.0000"
    assert page.percent(-1e-9) == "0.00"
    assert page.number(None) == page.percent(None) == page.amount(None) == "–"
    assert page.number(math.pi, 2) == "3.14"


def of_many_classes(summary, classes=1000, images=50_000):
    """Make of a run's numbers those of ImageNet's size, with its long names."""
    names = [f"great white shark, white shark, man-eater, Carcharodon {k}" for k in range(classes)]
    summary["classes"] = names
    for role in ("teacher", "baseline", "student", "student_best"):
        if summary.get(role):
            summary[role]["recall"] = [k / classes for k in range(classes)]
    summary["majority"] = {"class": names[0], "share": 1 / classes,
                           "counts": [images // classes] * classes}  # fmt: skip
    summary["images"]["test"] = images
    pairs = [[k, classes - 1 - k, 30 - k] for k in range(20)]
    summary["evidence"]["confusion"] = {"matrix": None, "pairs": pairs}
    for k, example in enumerate(summary["evidence"]["examples"]):
        example["target"] = 40 * k


def test_a_page_of_a_thousand_classes_is_small_and_its_names_fit(copied):
    before = (copied / "report.html").stat().st_size
    page = edit(copied, of_many_classes)
    assert len(page.encode()) < before + 50_000
    assert "1,000 classes" in page
    assert "of 1,000 classes the 20 that the student finds least" in page
    assert page.count('class="name">') == 1 + 2 * 20 + 20  # a heading, mistakes, lowest recalls
    whole = "great white shark, white shark, man-eater, Carcharodon 40"
    assert f'<strong title="{whole}">{brief(whole)}</strong>' in page


def test_a_long_name_is_cut():
    assert brief("tench") == "tench"
    assert brief("x" * 40) == "x" * 40
    assert brief("great white shark, white shark, man-eater, more") == (
        "great white shark, white shark, man-eat…"
    )
    assert brief("a" * 37 + ", and more") == "a" * 37 + "…"
