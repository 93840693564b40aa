"""The pages in a real browser: silent, self-contained, whole, and readable on a phone."""

import json
from pathlib import Path

import pytest

CHROMIUM = Path("/usr/bin/chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.exists(), reason="Debian's chromium is not installed"),
]
QUICK = ("trainer.max_epochs=2", "teacher.fit.max_epochs=1", "trainer.accelerator=cpu",
         "trainer.limit_train_batches=10")  # fmt: skip
RUN_SECTIONS = ("headline", "confidence", "fidelity", "mistakes", "selective", "learning", "cost",
                "made")  # fmt: skip
WIDTHS = ((1280, "light"), (390, "dark"))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, cache):
    import os
    import subprocess

    from tests.conftest import BIN

    folder = tmp_path_factory.mktemp("pages")
    environment = {**os.environ, "DISTILL_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [BIN / "distill", "-m", "objective.temperature=1,4", "seed=0,1", *QUICK,
         "annealing=linear", "hydra.sweep.dir=sweep"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "sweep"


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"]
        )
        yield started
        started.close()


@pytest.fixture(params=WIDTHS, ids=lambda value: f"{value[0]}-{value[1]}")
def opened(request, browser):
    """Open a page; at the end nothing was said on the console and nothing was asked for."""
    width, scheme = request.param
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))

    def go(path):
        page.goto(path.as_uri())
        page.wait_for_load_state()
        return page

    yield go
    page.wait_for_timeout(100)
    page.close()
    assert said == []
    assert len([url for url in asked if not url.startswith("data:")]) == 1, asked


def overflow(page):
    return page.evaluate("document.documentElement.scrollWidth - window.innerWidth")


def check_figures(page, least):
    drawn = page.locator("[role=img]")
    assert drawn.count() >= least
    for i in range(drawn.count()):
        assert len(drawn.nth(i).get_attribute("aria-label")) > 40
        box = drawn.nth(i).bounding_box()
        assert box["width"] > 150
        assert box["height"] > 100
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))  # or one drawing would clip another


def test_the_page_of_a_run(sweep, opened):
    page = opened(sweep / "0" / "report.html")
    for name in RUN_SECTIONS:
        assert page.locator(f"section#{name}").is_visible(), name
    assert overflow(page) <= 0
    check_figures(page, least=10)
    summary = json.loads((sweep / "0" / "summary.json").read_text())
    images = page.locator(".examples img")
    assert images.count() == len(summary["evidence"]["examples"]) > 0
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    row = page.locator("#headline tr.student").inner_text().split()
    assert f"{100 * summary['student']['top1']:.2f}" in row
    low, high = summary["student"]["intervals"]["top1"]
    assert f"{100 * low:.1f}–{100 * high:.1f}" in row
    assert page.locator("nav a").count() >= 6
    for link in page.locator("nav a").all():
        assert page.locator(link.get_attribute("href")).count() == 1


def test_text_and_drawings_follow_light_and_dark(sweep, opened):
    page = opened(sweep / "0" / "report.html")
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")

    def brightness(expression):
        colour = page.evaluate(expression)
        return sum(int(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]) / 765

    paper = brightness("getComputedStyle(document.body).backgroundColor")
    ink = brightness("getComputedStyle(document.querySelector('figure svg text')).fill")
    assert (paper < 0.2) == dark
    assert abs(paper - ink) > 0.6


def test_the_leaderboard_links_and_sorts(sweep, opened):
    page = opened(sweep / "report.html")
    assert overflow(page) <= 0
    check_figures(page, least=3)
    assert page.locator(".leaderboard tbody tr").count() == 4
    assert page.locator(".leaderboard tbody a").first.get_attribute("href").endswith("report.html")
    headings = page.locator(".leaderboard th")
    for i in range(headings.count()):
        heading = headings.nth(i)
        for order in ("ascending", "descending"):
            heading.locator("button").click()
            assert heading.get_attribute("aria-sort") == order
            cells = page.locator(f".leaderboard tbody tr td:nth-child({i + 1})").all()
            shown = [float(c.get_attribute("data-value") or c.inner_text()) for c in cells]
            assert shown == sorted(shown, reverse=order == "descending"), heading.inner_text()


def test_every_link_of_the_pages_leads_to_a_file(sweep, opened):
    for path in (sweep / "report.html", sweep / "1" / "report.html"):
        if path.parent == sweep:
            page = opened(path)
            found = page.evaluate("[...document.links].map(a => a.getAttribute('href'))")
            assert found
            assert all((path.parent / link).exists() for link in found if link[0] != "#")


def test_one_page_over_several_sweeps_from_files_alone(command, sweep, tmp_path, browser):
    before = (sweep / "0" / "report.html").read_bytes()
    (sweep / "0" / "report.html").unlink()
    done = command("distill-report", sweep, sweep / "1", "--output", "all.html")
    assert (sweep / "0" / "report.html").read_bytes() == before
    assert done.stdout.splitlines()[-1] == "all.html"
    page = browser.new_page()
    page.goto((tmp_path / "all.html").as_uri())
    assert page.locator(".leaderboard tbody tr").count() == 5
    links = page.evaluate("[...document.links].map(a => a.getAttribute('href'))")
    assert all((tmp_path / link).exists() for link in links)
    page.close()
