"""Take the README's pictures of a run's and a sweep's page: screenshots.py RUN SWEEP.

Needs the dev extra and Debian's chromium.
"""

from __future__ import annotations

import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

PICTURES = Path(__file__).parent / "pictures"


def main(run: str, sweep: str) -> None:
    """Write `run.png` and `sweep.png`, of the top of each page."""
    PICTURES.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu"]
        )
        for name, folder, height in (("run", run, 1000), ("sweep", sweep, 960)):
            page = browser.new_page(viewport={"width": 1180, "height": height})
            page.goto((Path(folder).resolve() / "report.html").as_uri())
            page.screenshot(path=PICTURES / f"{name}.png")
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
