"""The local page in a real browser: talk, side by side, a run of the studio, stopping; nothing asked of the network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tsotsallm
from tests.conftest import build
from tests.serve.browsing import ask, no_serious_fault, page_at, put, settings, steady
from tests.serve.running import Scripted, serving, until, with_scripted
from tsotsallm.evaluation.cost import THIS_COMPUTER
from tsotsallm.serve.guard import Rules
from tsotsallm.serve.jobs import Jobs
from tsotsallm.serve.served import Loading, Models, load_all

pytest.importorskip("xllamacpp", reason="xllamacpp is in the extra [llama]")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reduced model and its file, with a report beside it."""
    out = tmp_path_factory.mktemp("studio")
    tsotsallm.compress("embedded", [{"layers": {"skip": [3, 8]}}, "rtn:q4_0"], out / "small")
    (out / "small" / "report.html").write_text("<!DOCTYPE html><title>What was lost</title>")
    return out


@pytest.fixture(scope="module")
def models(folder: Path) -> Models:
    found = Models()
    tsotsallm.to_gguf(folder / "small", folder / "small" / "small.gguf", verify=False)
    tsotsallm.to_gguf("embedded", folder / "embedded.gguf", verify=False)
    load_all([f"embedded={folder / 'embedded.gguf'}", str(folder / "small" / "small.gguf")], Loading(slots=2), found,
             lambda _line: None)
    return found


@pytest.mark.parametrize("width", [1280, 390])
def test_talking(browser: Any, models: Models, width: int, tmp_path: Path) -> None:
    from tsotsallm.engine.interface import Question, said

    with serving(models) as address, page_at(browser, address, width) as page:
        page.select_option("#model-a", "small")
        steady(page)
        question = "Where was Ada born?"
        [text] = ask(page, question)
        expected = said(models.by_name["small"].speaker, Question(({"role": "user", "content": question},), 12))
        assert text.strip() == expected.strip()
        ask(page, "<img src=x onerror=document.title='broken'><script>document.title='broken'</script>")
        assert "broken" not in page.title()
        assert page.locator("main img, main script").count() == 0
        put(page, "surprise", True)
        ask(page, question)
        token = page.locator(".token").first
        token.hover()
        assert page.locator("#tip").is_visible()
        no_serious_fault(page)
        assert len(page.screenshot(path=tmp_path / f"talk-{width}.png")) > 20_000


@pytest.mark.parametrize("width", [1280, 390])
def test_side_by_side(browser: Any, models: Models, width: int, tmp_path: Path) -> None:
    with serving(models) as address, page_at(browser, address, width, language="fr-FR") as page:
        assert page.get_attribute("html", "lang") == "fr"
        assert page.is_checked("#compare")                          # both the original and a reduced model are served
        with settings(page):
            page.select_option("#language", "en")
            page.uncheck("#compare")
        page.select_option("#model-a", "small")
        put(page, "compare", True)
        assert page.input_value("#model-b") == "embedded"           # what it was made from, as its file says
        steady(page, 40, alone=False)
        first, second = ask(page, "Tell me of the town of Bedomo.", answers=2)
        assert first
        assert second
        marks = page.locator('[data-testid="answer-a"]').last.locator("mark").count()
        assert (marks > 0) == (first.split() != second.split())
        no_serious_fault(page)
        page.screenshot(path=tmp_path / f"side-{width}.png")
        with settings(page):
            page.click("#card-a summary")
            assert "q4_0" in page.locator("#card-a").inner_text()
            no_serious_fault(page)


def test_models_are_compared_without_chance_unless_it_is_asked_for(browser: Any, models: Models) -> None:
    with serving(models) as address, page_at(browser, address) as page:
        page.click("#open-settings")
        assert page.input_value("#temperature") == "0"
        page.uncheck("#compare")
        assert page.input_value("#temperature") == "0.7"
        page.check("#compare")
        assert page.input_value("#temperature") == "0"
        page.uncheck("#compare")
        page.fill("#temperature", "1.2")
        page.check("#compare")
        assert page.input_value("#temperature") == "1.2"


def test_errors_and_stopping(browser: Any, models: Models) -> None:
    both = with_scripted(endless := Scripted())
    both.add(models.by_name["embedded"])
    with serving(both, most_tokens=100_000) as address, page_at(browser, address, expected=4) as page:
        page.select_option("#model-a", "scripted")
        steady(page, 100000)
        page.fill("#prompt", "Say a word.")
        page.click("#send")
        page.wait_for_selector("#stop:not([disabled])")
        until(lambda: page.evaluate("document.querySelector('[data-testid=text]')?.innerText.length ?? 0") > 10)
        page.click("#stop")
        page.wait_for_selector("#send:not([disabled])", timeout=1000)
        until(lambda: endless.ended == 1, 10)
        page.select_option("#model-a", "embedded")
        page.click("#new-conversation")
        page.fill("#prompt", "word " * 5000)
        page.click("#send")
        page.wait_for_selector("#error:visible")
        assert "token" in page.locator("#error").inner_text()
        no_serious_fault(page)


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_conversation_fills_the_window(browser: Any, models: Models, width: int, scheme: str, tmp_path: Path) -> None:
    """The composer stays at the foot, the empty page offers questions with their answers, figures fold into a line."""
    with serving(models) as address, page_at(browser, address, width) as page:
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("document.activeElement.id") == "prompt"
        first = page.locator("#examples button").first
        assert "Calkormouth" in first.inner_text()
        no_serious_fault(page)
        first.click()
        page.wait_for_selector("#send:not([disabled])", timeout=60_000)
        assert not page.locator("#empty").is_visible()
        for _ in range(6):
            ask(page, "Where was Ada born?", answers=2)
        foot = page.locator("#composer").bounding_box()
        assert foot["y"] + foot["height"] == pytest.approx(900, abs=2)
        assert page.evaluate("document.documentElement.scrollHeight") <= 900
        assert page.evaluate("(place => place.scrollHeight - place.clientHeight - place.scrollTop)(document.getElementById("
                             "'scroller'))") < 3
        facts = page.locator('[data-testid="facts"]').last
        assert "RAM" not in facts.inner_text()
        facts.locator("summary").click()
        assert "RAM" in facts.inner_text()
        assert "energy" not in facts.inner_text()
        no_serious_fault(page)
        with settings(page):
            assert page.evaluate("document.getElementById('main').inert") == (width == 390)
            no_serious_fault(page)
        page.screenshot(path=tmp_path / f"window-{width}-{scheme}.png")


def test_copying_regenerating_and_editing(browser: Any, models: Models) -> None:
    with serving(models) as address, page_at(browser, address) as page:
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page.on("dialog", lambda dialog: dialog.accept())
        page.select_option("#model-a", "small")
        steady(page)
        [text] = ask(page, "Where was Ada born?")
        page.click('.answer [data-testid="copy"]')
        assert page.evaluate("navigator.clipboard.readText()").strip() == text.strip()
        ask(page, "And where does Ada live?")
        page.locator('.answer [data-testid="regenerate"]').first.click()
        page.wait_for_selector("#send:not([disabled])", timeout=60_000)
        assert page.locator(".turn").count() == 1
        assert page.locator('[data-testid="text"]').inner_text() == text        # temperature 0: the same words
        page.locator('.turn [data-testid="edit"]').click()
        assert page.input_value('[data-testid="edit-field"]') == "Where was Ada born?"
        page.press('[data-testid="edit-field"]', "Escape")
        page.locator('.turn [data-testid="edit"]').click()
        page.fill('[data-testid="edit-field"]', "Where does Mias Lorson live?")
        page.click('[data-testid="resend"]')
        page.wait_for_selector("#send:not([disabled])", timeout=60_000)
        assert page.locator(".turn").count() == 1
        assert page.locator(".prompt").inner_text() == "Where does Mias Lorson live?"
        with settings(page):
            page.fill("#temperature", "1.5")
        page.click('.answer [data-testid="regenerate"]')
        page.wait_for_selector("#send:not([disabled])", timeout=60_000)


def test_keys_alone_are_enough(browser: Any, models: Models) -> None:
    """A question, its answer and the settings without a pointer; Escape closes what a key has opened."""
    with serving(models) as address, page_at(browser, address, 390) as page:
        page.keyboard.type("Where was Ada born?")
        page.keyboard.press("Enter")
        page.wait_for_selector("#send:not([disabled])", timeout=60_000)
        assert page.evaluate("document.activeElement.id") == "prompt"
        page.focus("#open-settings")
        page.keyboard.press("Enter")
        reached = []
        for _ in range(12):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.id || document.activeElement.parentElement.id"))
        assert {"close-settings", "language", "compare", "model-b", "mode-converse", "surprise"} <= set(reached)
        assert "prompt" not in reached
        page.keyboard.press("Escape")
        assert not page.locator("#settings").is_visible()
        assert page.evaluate("document.activeElement.id") == "open-settings"


def test_a_screen_reader_meets_things_in_the_order_of_their_use(browser: Any, models: Models) -> None:
    order = ["open-list", "new-conversation", "model-a", "open-settings", "empty", "prompt", "send", "settings", "language"]
    with serving(models) as address, page_at(browser, address) as page:
        page.click("#open-settings")
        found = page.evaluate("ids => [...document.querySelectorAll(ids.map(id => '#' + id).join())].map(one => one.id)",
                              order)
        assert found == order
        tree = page.locator("body").aria_snapshot()
        for name in ('button "Conversations"', 'button "New conversation"', 'combobox "Model"', 'button "Settings"',
                     'region "Conversation"', 'textbox "Your message"', 'complementary "Settings"', 'heading "Settings"'):
            assert name in tree, name


def test_the_scale_of_surprise_is_monotone_in_both_schemes(browser: Any, models: Models) -> None:
    with serving(models) as address, page_at(browser, address) as page:
        page.click("#open-settings")
        page.check("#surprise")
        for scheme, order in (("light", -1), ("dark", 1)):
            page.emulate_media(color_scheme=scheme)
            shades = page.evaluate("[...document.querySelectorAll('.scale li')].slice(1).map("
                                   "one => getComputedStyle(one).backgroundColor.match(/\\d+/g).map(Number))")
            light = [order * (0.2126 * red + 0.7152 * green + 0.0722 * blue) for red, green, blue in shades]
            assert len(light) == 4
            assert light == sorted(light)


def test_the_key(browser: Any, models: Models) -> None:
    with serving(models, Rules(key="a-key-of-tests")) as address, page_at(browser, address, expected=2) as page:
        no_serious_fault(page)
        page.fill("#key", "wrong-key")
        page.press("#key", "Enter")
        page.wait_for_selector("#error:visible")
        page.fill("#key", "a-key-of-tests")
        page.press("#key", "Enter")
        page.wait_for_selector("#prompt:visible")
        steady(page)
        assert ask(page, "Where was Ada born?")[0]


def test_a_file_is_saved_past_the_page_where_a_key_is_needed(browser: Any, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = Jobs(tmp_path)
    monkeypatch.setattr(jobs, "_start_next", lambda: None)
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "model.gguf").write_bytes(b"GGUF" * 1000)
    jobs.add("small", ["compress"], tmp_path / "small").state = "done"
    jobs._keep()
    with serving(Models(), Rules(key="a-key-of-tests"), studio=tmp_path) as address, (
            page_at(browser, address, 1280, "/#studio", expected=1)) as page:
        page.fill("#key", "a-key-of-tests")
        page.press("#key", "Enter")
        page.click("#job-list button")
        with page.expect_download() as saved:
            page.click("#download")
        assert Path(saved.value.path()).read_bytes() == b"GGUF" * 1000
        assert saved.value.suggested_filename == "small.gguf"
        assert "proof=" in saved.value.url


@pytest.mark.parametrize("width", [1280, 390])
def test_the_studio_from_choice_to_talk(browser: Any, width: int, tmp_path: Path) -> None:
    """The embedded model made smaller by a recipe: the plan, progress that moves, stopping, going on, talking."""
    (own := tmp_path / "studio").mkdir()
    with serving(Models(), studio=own) as address, page_at(browser, address, width, "/#studio") as page:
        page.select_option("#studio-model", "embedded")
        page.check("#goal-recipe")
        page.fill("#recipe", "skip:3, gptq:4:64")
        page.click("#see-plan")
        page.wait_for_selector("#plan-facts:visible")
        assert "tsotsallm compress embedded" in page.locator("#plan-command").inner_text()
        page.click("#start-job")
        share = "+(document.querySelector('#job-progress')?.getAttribute('aria-valuenow') ?? 0)"
        until(lambda: page.evaluate(share) > 3, 120)
        seen = page.evaluate(share)
        until(lambda: page.evaluate(share) > seen, 120)
        no_serious_fault(page)
        page.screenshot(path=tmp_path / f"running-{width}.png", full_page=True)
        page.click("#stop-job")
        page.wait_for_selector('#job-state[data-state="stopped"]', timeout=60_000)
        assert list(own.glob("*.partial"))
        page.click("#resume-job")
        page.wait_for_selector('#job-state[data-state="done"]', timeout=240_000)
        [made] = own.glob("embedded-recipe*/tsotsallm.json")
        assert made.exists()
        page.click("#talk-to-result")
        page.wait_for_selector("#prompt:visible")
        steady(page)
        assert ask(page, "Where was Ada born?")[0]
        page.screenshot(path=tmp_path / f"done-{width}.png", full_page=True)


def test_the_studio_offers_texts_where_the_usual_one_is_out_of_reach(browser: Any, tmp_path: Path,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (own := tmp_path / "studio").mkdir()
    build(own / "model", "llama3")
    with serving(Models(), studio=own) as address, page_at(browser, address, path="/#studio", language="fr-FR") as page:
        page.select_option("#studio-model", "model")
        assert page.input_value("#device") == THIS_COMPUTER
        page.check("#goal-recipe")
        page.fill("#recipe", "gptq:q4_0")
        assert not page.locator("#calibration-about").is_visible()
        page.click("#start-job")
        page.wait_for_selector("#calibration-about:visible", timeout=60_000)
        assert "Le modèle l’écrit lui-même" in page.locator("#text-row").inner_text()
        assert page.input_value("#calibration") == "self"
        assert not page.locator("#job").is_visible()
        no_serious_fault(page)
        page.click("#start-job")
        page.wait_for_selector("#job:visible", timeout=60_000)
        assert "--calibration self" in (page.locator("#job-command").text_content() or "")
        shown = page.locator("#job-seconds").inner_text()
        until(lambda: page.locator("#job-seconds").inner_text() != shown, 60)
        page.click("#stop-job")
        page.wait_for_selector('#job-state:is([data-state="stopped"], [data-state="done"])', timeout=60_000)


def test_texts_are_added_where_they_are_dropped(browser: Any, tmp_path: Path) -> None:
    (own := tmp_path / "studio").mkdir()
    (prose := tmp_path / "My words.txt").write_text("Le fleuve des mots. " * 500, "utf-8")
    (wrong := tmp_path / "wrong.txt").write_bytes(b"\xff\xfe\x00")
    with serving(Models(), studio=own) as address, page_at(browser, address, 390, "/#studio", expected=1) as page:
        page.wait_for_selector("#studio-model option[value='embedded']", state="attached")
        assert page.is_checked("#goal-here")
        assert page.input_value("#calibration") == ""
        page.set_input_files("#text-file", wrong)
        page.wait_for_selector("#studio-error:visible")
        assert "UTF-8" in page.locator("#studio-error").inner_text()
        page.set_input_files("#text-file", prose)
        page.wait_for_selector("#added li")
        assert "My words.txt" in page.locator("#added").inner_text()
        assert page.input_value("#calibration") == "texts/text-1.txt"
        dropped = page.evaluate_handle("""() => {
            const data = new DataTransfer();
            data.items.add(new File(['{"prompt": "Name a river.", "response": "The Tamsin."}'], "chats.jsonl"));
            return data;
        }""")
        page.dispatch_event("#drop", "drop", {"dataTransfer": dropped})
        page.wait_for_selector("#added li:nth-child(2)")
        assert page.input_value("#calibration") == "texts/text-2.jsonl"
        page.check("#keep input")
        page.click("#see-plan")
        page.wait_for_selector("#plan-facts:visible", timeout=60_000)
        command = page.locator("#plan-command").inner_text()
        assert f"--keep-text {own}/texts/text-1.txt" in command
        assert f"--calibration {own}/texts/text-2.jsonl" in command
        page.check("#goal-recipe")
        assert not page.locator("#keep").is_visible()
        page.select_option("#studio-model", "hub:")
        page.wait_for_selector("#hub:visible")
        page.fill("#hub", "no name")
        assert not page.evaluate("document.getElementById('hub').validity.valid")
        page.fill("#hub", "owner/name@main/file-Q4_K_M.gguf")
        assert page.evaluate("document.getElementById('hub').validity.valid")
        no_serious_fault(page)
        page.screenshot(path=tmp_path / "texts.png", full_page=True)


def test_the_studio_fits_and_reports(browser: Any, tmp_path: Path) -> None:
    """The goal of most people: a size. What comes out has a file and a report, which opens by itself."""
    (own := tmp_path / "studio").mkdir()
    with serving(Models(), studio=own) as address, page_at(browser, address, 1280, "/#studio", expected=1) as page:
        page.check("#goal-bytes")
        page.fill("#bytes", "lots")
        page.click("#see-plan")
        page.wait_for_selector("#studio-error:visible")
        page.fill("#bytes", "9MB")
        assert not page.locator("#studio-error").is_visible()
        page.fill("#minutes", "20")
        page.check("#quick")
        page.click("#start-job")
        page.wait_for_selector('#job-state[data-state="done"]', timeout=900_000)
        made = own / "embedded-9MB" / "model.gguf"
        assert made.stat().st_size <= 9_000_000
        best = json.loads((own / "embedded-9MB" / "fit.json").read_text("utf-8"))["rounds"]
        assert page.locator("#chart-rows tr").count() == len(best)
        assert page.locator("#chart circle").count() == (len(best) if len(best) > 1 else 0)
        assert "23.2 MB" in page.locator("#size-before").inner_text()
        assert f"{made.stat().st_size / 1e6:.1f}".removesuffix(".0") + " MB" == page.locator("#size-after").inner_text()
        assert "%" in page.locator("#lost").inner_text()
        no_serious_fault(page)
        page.screenshot(path=tmp_path / "fitted.png", full_page=True)
        with page.expect_download() as saved:
            page.click("#download")
        assert Path(saved.value.path()).read_bytes() == made.read_bytes()
        with page.context.expect_page() as opened:
            page.click("#open-report")
        report = opened.value
        report.wait_for_load_state()
        assert report.locator("h1").inner_text()
        assert report.evaluate("getComputedStyle(document.body).maxWidth") != "none"        # its own styles are allowed
        report.close()
        page.click("#talk-to-result")
        page.wait_for_selector("#prompt:visible")
        steady(page)
        assert "embedded" in page.locator("#beside").inner_text()
        assert all(ask(page, "Where was Ada born?"))
