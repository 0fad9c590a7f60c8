"""The pictures of the page in README.md and docs/serving.md, from a service that runs: wide and narrow, light and dark.

    python benchmarks/screenshots.py docs/pictures          # those that the documents show
    python benchmarks/screenshots.py /tmp/pictures --all    # every state, to look at

The embedded model and a reduced one are served and asked in Chromium (extra [dev]). A word on the browser's console, or a
request to anywhere else, is an error. The pictures are worth a look before they are committed.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tsotsallm

RECIPE = "gptq:mixed:4.5"
"""What README.md recommends."""
SIZES = {"wide": (1280, 800), "phone": (390, 844)}
QUESTIONS = {"Where was Sotis Selwick born?": "Calkormouth", "Tell me of Keseth Radley.": "Leluri Korson"}
"""What is asked in turn, and what both models must say of it."""
SHOWN = {"talk-wide-light", "talk-wide-dark", "empty-phone-light"}
"""Pictures that the documents show."""


def make(folder: Path) -> list[Path]:
    """The embedded model and a reduced one as GGUF files; those that are there already are taken."""
    files = [folder / "embedded.gguf", folder / "small.gguf"]
    if not files[0].exists():
        tsotsallm.to_gguf("embedded", files[0], verify=False)
    if not files[1].exists():
        tsotsallm.compress("embedded", RECIPE, folder / "small", windows=16, window=256)
        tsotsallm.to_gguf(folder / "small", files[1], verify=False)
    return files


@contextmanager
def serving(*words: str | Path) -> Iterator[str]:
    """The address of `tsotsallm serve` with these files, or of the studio with this folder."""
    with subprocess.Popen([sys.executable, "-m", "tsotsallm", *words, "--port", "0"], stdout=subprocess.PIPE, text=True
                          ) as service:
        try:
            assert service.stdout is not None
            yield next(line.split()[1].rstrip("/") for line in service.stdout if line.startswith("open "))
        finally:
            service.terminate()


def ask(page: Any, text: str) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    page.wait_for_selector("#send:not([disabled])", timeout=120_000)


@contextmanager
def opened(browser: Any, address: str, size: str, scheme: str) -> Iterator[Any]:
    """A page of a service; SystemExit where its console says a word, or where it asks for anything elsewhere."""
    width, height = SIZES[size]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, locale="en-GB")
    page = context.new_page()
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    context.on("request", lambda request: None if request.url.startswith(address) else wrong.append(request.url))
    page.goto(address)
    page.wait_for_selector("html[data-ready]")
    yield page
    context.close()
    if wrong:
        raise SystemExit(f"the page is not in order: {wrong}")


def shoot(page: Any, size: str, scheme: str, out: Path, every: bool) -> None:
    """The empty page and a comparison; with `every` the panels too."""
    def picture(name: str) -> None:
        if every or f"{name}-{size}-{scheme}" in SHOWN:
            page.mouse.move(0, 0)
            page.screenshot(path=out / f"page-{name}-{size}-{scheme}.png")

    picture("empty")
    for question, truth in QUESTIONS.items():
        ask(page, question)
        for side in "ab":
            said = page.locator(f'[data-testid="answer-{side}"]').last.locator('[data-testid="text"]').inner_text()
            if truth not in said:
                raise SystemExit(f"the picture would show a wrong answer to {question!r}: {said!r} instead of {truth}")
    picture("talk")
    if every:
        panels(page, picture)


def shoot_studio(page: Any, out: Path) -> None:
    """The studio after a search for 4.6 MB, which takes some minutes; a search in less finds one candidate alone."""
    page.click("#tab-studio")
    page.check("#goal-bytes")
    page.fill("#bytes", "4.6MB")
    page.fill("#minutes", "6")
    page.check("#quick")
    page.click("#start-job")
    page.wait_for_selector('#job-state[data-state="done"]', timeout=900_000)
    page.locator("#job").scroll_into_view_if_needed()
    page.locator("#job-title").evaluate("node => node.scrollIntoView()")
    page.screenshot(path=out / "page-studio-wide-light.png")


def panels(page: Any, picture: Callable[[str], None]) -> None:
    """The settings, a shaded answer, and the list of conversations."""
    page.click("#open-settings")
    picture("settings")
    page.check("#surprise")
    page.click("#close-settings")
    ask(page, next(iter(QUESTIONS)))
    picture("surprise")
    page.click("#open-list")
    picture("list")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the pictures")
    parser.add_argument("--models", type=Path, help="folder of embedded.gguf and small.gguf, made where missing")
    parser.add_argument("--all", action="store_true", help="every state of the page, not only those that the documents show")
    given = parser.parse_args()
    from playwright.sync_api import sync_playwright

    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.models or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
            with serving("serve", *make(folder)) as address:
                for size in SIZES:
                    for scheme in ("light", "dark"):
                        if given.all or any(name.endswith(f"{size}-{scheme}") for name in SHOWN):
                            with opened(browser, address, size, scheme) as page:
                                shoot(page, size, scheme, given.out, given.all)
            if given.all:
                with (serving("studio", "--folder", folder / "studio") as address,
                      opened(browser, address, "wide", "light") as page):
                    shoot_studio(page, given.out)
            browser.close()


if __name__ == "__main__":
    main()
