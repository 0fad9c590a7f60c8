"""The studio's page in a browser without any work: words for steps and devices, where errors stand, what a reload keeps."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import build
from tests.serve.browsing import ask, no_serious_fault, page_at, settings, steady
from tests.serve.running import Scripted, serving, until
from tsotsallm.serve.jobs import Jobs, StudioJob
from tsotsallm.serve.served import Models, Served

pytestmark = pytest.mark.slow


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Jobs:
    """Jobs of a folder of their own, none of which ever starts."""
    (own := tmp_path / "studio").mkdir()
    found = Jobs(own)
    monkeypatch.setattr(found, "_start_next", lambda: None)
    return found


def running(jobs: Jobs) -> StudioJob:
    """A search that is in its third minute of ten."""
    job = jobs.add("embedded: 9MB", ["fit", "embedded"], jobs.folder / "out", limit_s=600.0)
    job.state, job.began = "running", time.monotonic() - 150
    for number in range(60):
        jobs._hear(job, f"line {number} of the program")
    jobs._hear(job, '{"step": "quantize 3/30 editing", "share": 0.0, "stage": "quantize", "layer": 3, "layers": 30, '
                    '"done": 0.4}')
    return job


def said(page: Any, place: str) -> str:
    """A text of the page with plain spaces."""
    return " ".join(page.locator(place).inner_text().split())


def test_steps_are_in_words_and_the_log_is_folded(browser: Any, jobs: Jobs) -> None:
    job = running(jobs)
    with serving(Models(), studio=jobs) as address, page_at(browser, address, path="/#studio", language="fr-FR") as page:
        page.wait_for_selector("#job:visible")
        assert said(page, "#job-step") == "arrondi des poids : couche 3 sur 30 (40 %)"
        assert 25 <= int(page.get_attribute("#job-progress", "aria-valuenow")) <= 30        # of its time, not of a candidate
        assert "couche 3 sur 30" in page.get_attribute("#job-progress", "aria-valuetext")
        with settings(page):
            page.select_option("#language", "en")
        assert said(page, "#job-step") == "rounding the weights: layer 3 of 30 (40%)"
        jobs._hear(job, '{"step": "depth + quantize measuring", "share": 0.0, "stage": "depth + quantize", "layer": 0, '
                        '"layers": 0, "done": 0.999}')
        until(lambda: said(page, "#job-step") == "removing layers, rounding the weights (100%)")
        jobs._hear(job, '{"step": "novelty 1/2 editing", "share": 0.0, "stage": "novelty", "layer": 1, "layers": 2}')
        until(lambda: said(page, "#job-step") == "novelty 1/2 editing")
        assert not page.locator("#job-log").is_visible()
        page.click("#log summary")
        assert "line 59 of the program" in page.locator("#job-log").inner_text()
        until(lambda: page.evaluate("(log => log.scrollTop + log.clientHeight >= log.scrollHeight - 1 && log.scrollTop > 0)"
                                    "(document.getElementById('job-log'))"))    # after the event of its opening
        no_serious_fault(page)


def test_devices_have_names(browser: Any, jobs: Jobs) -> None:
    with serving(Models(), studio=jobs) as address, page_at(browser, address, path="/#studio", language="fr-FR") as page:
        page.check("#goal-device")
        names = [" ".join(name.split()) for name in page.locator("#device option").all_text_contents()]
        assert names[0].startswith("Cet ordinateur (")
        assert "Raspberry Pi 4 de 4 Go (3 Go pour le modèle)" in names
        page.select_option("#device", "pi4-4gb")
        assert said(page, "#device-about") == "Environ 1 Go reste au système."


def test_an_error_stands_beside_its_field(browser: Any, jobs: Jobs, tmp_path: Path) -> None:
    (wrong := tmp_path / "wrong.txt").write_bytes(b"\xff\xfe\x00")
    with serving(Models(), studio=jobs) as address, page_at(browser, address, 390, "/#studio", expected=3) as page:
        page.check("#goal-bytes")
        page.fill("#bytes", "lots")
        page.click("#see-plan")
        page.wait_for_selector("#bytes + #studio-error:visible")
        assert "lots" in said(page, "#studio-error")
        assert page.evaluate("document.activeElement.id") == "bytes"
        assert page.get_attribute("#bytes", "aria-invalid") == "true"
        assert page.get_attribute("#bytes", "aria-describedby") == "studio-error bytes-about"
        no_serious_fault(page)
        page.screenshot(path=tmp_path / "beside.png", full_page=True)
        page.fill("#bytes", "9MB")
        assert not page.locator("#studio-error").is_visible()
        assert page.get_attribute("#bytes", "aria-invalid") is None
        assert page.get_attribute("#bytes", "aria-describedby") == "bytes-about"
        page.check("#goal-recipe")
        page.fill("#recipe", "nonsense:4")
        page.click("#start-job")
        page.wait_for_selector("#recipe + #studio-error:visible")
        assert page.evaluate("document.activeElement.id") == "recipe"
        page.set_input_files("#text-file", wrong)
        page.wait_for_selector("#studio-form > #studio-error:last-child:visible")          # no field of a wish is wrong
        assert page.evaluate("document.activeElement.id") == "studio-error"
        assert page.locator("[aria-invalid]").count() == 0


def test_a_reload_keeps_the_form(browser: Any, jobs: Jobs) -> None:
    (jobs.folder / "my prose.txt").write_text("Un fleuve de mots. " * 500)
    with serving(Models(), studio=jobs) as address, page_at(browser, address, path="/#studio") as page:
        page.select_option("#studio-model", "hub:")
        page.fill("#hub", "owner/name")
        page.check("#goal-bytes")
        page.fill("#bytes", "9MB")
        page.select_option("#calibration", "my prose.txt")
        page.check("#keep-texts input")
        page.fill("#minutes", "7")
        page.check("#quick")
        page.reload()
        page.wait_for_selector("html[data-ready]")
        assert page.input_value("#studio-model") == "hub:"
        assert page.locator("#hub").is_visible()
        assert page.input_value("#hub") == "owner/name"
        assert page.is_checked("#goal-bytes")
        assert page.locator("#bytes").is_visible()
        assert [page.input_value(f"#{name}") for name in ("bytes", "calibration", "minutes")] == ["9MB", "my prose.txt", "7"]
        assert page.is_checked("#keep-texts input")
        assert page.is_checked("#quick")
        page.check("#goal-recipe")
        page.click("#packaged button >> nth=0")
        recipe = page.input_value("#recipe")
        (jobs.folder / "my prose.txt").unlink()             # what is not offered any more is not chosen
        page.reload()
        page.wait_for_selector("html[data-ready]")
        assert recipe
        assert page.input_value("#recipe") == recipe
        assert page.locator("#recipe").is_visible()
        assert page.input_value("#calibration") == ""


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_studio_in_both_schemes(browser: Any, jobs: Jobs, width: int, scheme: str, tmp_path: Path) -> None:
    """The form with a plan, a job that runs, and one that failed, whose message and remedy are shown."""
    running(jobs)
    failed = jobs.add("embedded: recipe", ["compress", "embedded"], jobs.folder / "other")
    failed.state, failed.error = "failed", "the disk is full: 3 MB are free, 9 MB are needed; make room, then resume"
    with serving(Models(), studio=jobs) as address, page_at(browser, address, width, "/#studio") as page:
        page.emulate_media(color_scheme=scheme)
        page.check("#goal-bytes")
        page.fill("#bytes", "9MB")
        page.click("#see-plan")
        page.wait_for_selector("#plan-facts:visible")
        page.wait_for_selector("#job:visible")
        no_serious_fault(page)
        page.screenshot(path=tmp_path / f"form-{width}-{scheme}.png")
        page.locator("#job-title").evaluate("node => node.scrollIntoView()")
        page.screenshot(path=tmp_path / f"running-{width}-{scheme}.png")
        page.click("#job-list button >> text=embedded: recipe")
        page.wait_for_selector("#job-error:visible")
        assert said(page, "#job-reason") == failed.error
        assert "then resume" in said(page, "#job-remedy")
        assert page.locator("#resume-job").is_visible()
        assert said(page, "#job-state") == "Failed"
        no_serious_fault(page)
        page.locator("#job-title").evaluate("node => node.scrollIntoView()")
        page.screenshot(path=tmp_path / f"failed-{width}-{scheme}.png")


def test_a_result_whose_original_is_elsewhere_is_served_alone(browser: Any, jobs: Jobs) -> None:
    job = jobs.add("small", ["compress"], build(jobs.folder / "small", "llama3"), source="/elsewhere/model")
    job.state = "done"
    with serving(models := Models(), studio=jobs) as address, (
            page_at(browser, address, path="/#studio", language="fr-FR")) as page:
        page.click("#job-list button")
        page.click("#talk-to-result")
        page.wait_for_selector("#error:visible", timeout=60_000)
        assert said(page, "#error") == ("L’original n’est pas servi à côté : il n’est pas parmi les modèles du dossier de "
                                        "l’Atelier.")
        assert page.locator("#prompt").is_visible()
        assert list(models.by_name) == ["small"]


def speaking(name: str, original: str | None = None, memory: int | None = None) -> Served:
    return Served(name, f"/models/{name}", "checkpoint", Scripted(), 10, 10, None, original, None, memory, None)


def test_comparing_begins_with_a_model_whose_original_is_served(browser: Any) -> None:
    models = Models()
    for one in (speaking("other"), speaking("small", "/models/big", 123_000_000), speaking("big")):
        models.add(one)
    with serving(models) as address, page_at(browser, address) as page:
        assert page.is_checked("#compare")
        assert [page.input_value(f"#model-{side}") for side in "ab"] == ["small", "big"]
        steady(page, 3)
        ask(page, "Say a word.")
        page.click('[data-testid="facts"] summary')
        assert "123 MB of memory (RAM) with one conversation" in said(page, '[data-testid="facts"]')
