"""Answers as Markdown in a real browser: what is rendered, what never runs, and whose libraries do it."""

from __future__ import annotations

import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from tests.serve.browsing import ask, no_serious_fault, page_at, put
from tests.serve.running import Scripted, serving, with_scripted
from tsotsallm.engine.interface import Answer, Heard, Piece, Question, Token

VENDOR = resources.files("tsotsallm.serve") / "page" / "vendor"
HARMLESS = {"P", "BR", "STRONG", "EM", "DEL", "CODE", "PRE", "BLOCKQUOTE", "UL", "OL", "LI", "H5", "H6", "HR", "A", "TABLE",
            "THEAD", "TBODY", "TR", "TH", "TD", "DIV", "BUTTON"}
ATTRIBUTES = {"href", "target", "rel", "dir", "start", "align", "tabindex", "class", "type", "data-testid", "data-text"}
PAYLOADS = [
    "<script>window.bad = 1</script>",
    "<scr<script>ipt>window.bad = 1</scr</script>ipt>",
    "<img src=x onerror='window.bad = 1'>",
    "<img/src/onerror=window.bad=1>",
    "![x](x\" onerror=\"window.bad=1)",
    "![x](https://elsewhere.example/x.png)",
    "[x](javascript:window.bad=1)",
    "[x](JaVaScRiPt&colon;window.bad=1)",
    "[x](java\tscript:window.bad=1)",
    "[x](data:text/html,<script>window.bad=1</script>)",
    "[x](vbscript:window.bad=1)",
    "[x](blob:window.bad)",
    "[x](/v1/models)",
    "<javascript:window.bad=1>",
    "<a href='javascript:window.bad=1'>x</a>",
    "[x]: javascript:window.bad=1\n\n[x]",
    "<svg onload='window.bad=1'><script>window.bad=1</script></svg>",
    "<svg><animate onbegin=window.bad=1 attributeName=x dur=1s>",
    "<svg><a xlink:href='javascript:window.bad=1'><text y=20>x</text></a></svg>",
    "<math><mtext><table><mglyph><style><img src=x onerror=window.bad=1>",
    "<style>body { display: none } @import '//elsewhere.example/x.css';</style>",
    "<p style='position: fixed; inset: 0; background: url(//elsewhere.example/x)'>x</p>",
    "<link rel=stylesheet href=//elsewhere.example/x.css>",
    "<form id=composer action=//elsewhere.example><input name=prompt><button>send</button></form>",
    "<button formaction=//elsewhere.example form=composer>send</button>",
    "<iframe src='javascript:window.bad=1'></iframe>",
    "<iframe srcdoc='<script>parent.bad=1</script>'></iframe>",
    "<object data=//elsewhere.example></object><embed src=//elsewhere.example>",
    "<video><source onerror=window.bad=1></video><audio src=x onerror=window.bad=1>",
    "<meta http-equiv=refresh content='0; url=//elsewhere.example'>",
    "<base href=//elsewhere.example>",
    "<a id=send name=send>x</a><img name=getElementById><form name=body></form>",
    "<form><input name=attributes><input name=nodeName><input name=parentNode></form>",
    "<details open ontoggle=window.bad=1>x</details>",
    "<input autofocus onfocus=window.bad=1>",
    "<body onload=window.bad=1><html onclick=window.bad=1>",
    "<!--><img src=x onerror=window.bad=1>-->",
    "<![CDATA[<img src=x onerror=window.bad=1>]]>",
    "<noscript><p title='</noscript><img src=x onerror=window.bad=1>'></noscript>",
    "<template><script>window.bad=1</script></template>",
    "</div></section></main><h1>Give your key</h1>",
    "$<img src=x onerror=window.bad=1>$ and $$<script>window.bad=1</script>$$",
    "```<img src=x onerror=window.bad=1>\n<script>window.bad=1</script>\n```",
    "`<img src=x onerror=window.bad=1>`",
    "| <img src=x onerror=window.bad=1> |\n|---|\n| <script>window.bad=1</script> |",
    "# <img src=x onerror=window.bad=1>",
    "<x" + ">" * 3 + "&lt;script&gt;window.bad=1&lt;/script&gt;",
    "> " * 400 + "<script>window.bad = 1</script>",
]
SHOWN = """Some *words*, ~~old~~ **new**, `code`, and $a_1 * b_2 * c$ at 5 $ or 6 $.

## A table

| number | square |
|---|--:|
| 2 | 4 |

- one
- two
  1. inner

```python
def f(x):
    return x ** 2  # <b>not bold</b>
```

\\[ \\frac{a_i}{b_i} * 2 * 3 \\]

- [x] done

> quoted

A [link](https://example.org/a_b_c), and 1 < 2 & 3.
"""


class Reciting(Scripted):
    """A speaker that answers a prompt N with the Nth of its texts, a few letters at a time."""

    def __init__(self, texts: list[str]) -> None:
        super().__init__()
        self.texts = texts

    def speak(self, question: Question, heard: Heard) -> Answer:
        messages = question.prompt
        assert not isinstance(messages, str)
        last = messages[-1]
        assert isinstance(last, dict)
        text = self.texts[int(last["content"])]
        parts = [text[place:place + 3] for place in range(0, len(text), 3)]
        for part in parts:
            heard(Piece(part, (Token(part, part.encode(), -1.0),) if question.likeliest is not None else ()))
        return Answer("stop", 3, len(parts), 0.001, 0.01)


def answers_of(browser: Any, texts: list[str], check: Any, **how: Any) -> None:
    """Let `check(page, answer, number)` check every answer of a speaker that recites texts."""
    with serving(with_scripted(Reciting(texts)), most_tokens=4096) as address, page_at(browser, address, **how) as page:
        for number in range(len(texts)):
            ask(page, str(number))
            check(page, page.locator('[data-testid="answer-a"]').last.locator('[data-testid="text"]'), number)


def test_vendored_libraries_are_as_published() -> None:
    recorded = json.loads((VENDOR / "vendored.json").read_text("utf-8"))["files"]
    named = {"vendored.json"}
    for one in recorded:
        for name, sum_ in (("file", "sha256"), ("licence_file", "licence_sha256")):
            assert hashlib.sha256((VENDOR / one[name]).read_bytes()).hexdigest() == one[sum_], one[name]
            named.add(one[name])
        assert all(one[key] for key in ("package", "version", "path", "licence"))
        assert one["version"].encode() in (VENDOR / one["file"]).read_bytes()[:1000]
    assert {file.name for file in VENDOR.iterdir()} == named


@pytest.mark.slow
def test_markdown_is_rendered(browser: Any, tmp_path: Path) -> None:
    def check(page: Any, answer: Any, _number: int) -> None:
        for selector, text in (("em", "words"), ("strong", "new"), ("del", "old"), ("h5", "A table"), ("td >> nth=1", "4"),
                               ("li li", "inner"), ("blockquote", "quoted"), ("a", "link"), ("p code >> nth=0", "code")):
            assert answer.locator(selector).first.inner_text() == text, selector
        assert answer.locator("pre").first.inner_text() == "def f(x):\n    return x ** 2  # <b>not bold</b>\n"
        assert answer.locator("p code").nth(1).inner_text() == "$a_1 * b_2 * c$"
        assert answer.locator("pre").nth(1).inner_text() == "\\[ \\frac{a_i}{b_i} * 2 * 3 \\]"
        assert "☑ done" in answer.inner_text()
        assert "at 5 $ or 6 $." in answer.inner_text()
        assert "1 < 2 & 3." in answer.inner_text()
        assert answer.locator("a").get_attribute("rel") == "noopener noreferrer"
        no_serious_fault(page)
        page.screenshot(path=tmp_path / "markdown.png")
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        answer.locator(".code button").first.click()
        assert page.evaluate("navigator.clipboard.readText()").startswith("def f(x):")
        page.locator('.answer > .under [data-testid="copy"]').click()
        assert page.evaluate("navigator.clipboard.readText()") == SHOWN

    answers_of(browser, [SHOWN], check, width=390)


@pytest.mark.slow
def test_shade_and_marks_work_on_markdown(browser: Any) -> None:
    """Words that differ are marked in the rendered text; the shade shows the text token by token, as it was written."""
    models = with_scripted(Reciting(["The **tall** tree is `old`."]))
    other = with_scripted(Reciting(["The **small** tree is `old`."])).by_name["scripted"]
    other.name = "other"
    models.add(other)
    with serving(models) as address, page_at(browser, address) as page:
        page.on("dialog", lambda dialog: dialog.accept())
        put(page, "compare", True)
        ask(page, "0", answers=2)
        assert page.locator("strong mark").all_inner_texts() == ["tall", "small"]
        assert page.locator("mark").count() == 2
        assert ": 2." in page.locator('[data-testid="differences"]').inner_text()
        put(page, "surprise", True)
        ask(page, "0", answers=2)
        shaded = page.locator('[data-testid="text"].shaded').first
        assert shaded.text_content() == "The **tall** tree is `old`."
        assert "".join(shaded.locator("mark").all_inner_texts()) == "tall"
        assert shaded.locator(".token").count() == 9
        put(page, "surprise", False)
        assert page.locator("strong mark").count() == 4


@pytest.mark.slow
def test_markup_in_an_answer_never_runs(browser: Any) -> None:
    def check(page: Any, answer: Any, number: int) -> None:
        found = answer.evaluate("place => [...place.querySelectorAll('*')].map(one => [one.nodeName, "
                                "one.getAttributeNames(), one.getAttribute('href')])")
        for name, attributes, link in found:
            assert name in HARMLESS, (PAYLOADS[number], name)
            assert set(attributes) <= ATTRIBUTES, (PAYLOADS[number], attributes)
            assert link is None or link.startswith(("https://", "http://", "mailto:")), (PAYLOADS[number], link)
        assert page.evaluate("window.bad") is None, PAYLOADS[number]
        assert page.evaluate("document.querySelectorAll('#send, #composer, h1').length") == 3
        assert page.evaluate("document.forms.length === document.querySelectorAll('form').length "
                             "&& document.body instanceof HTMLBodyElement && document.getElementById instanceof Function")

    answers_of(browser, PAYLOADS, check)


@pytest.mark.slow
def test_markup_in_the_name_of_a_model_stays_text(browser: Any) -> None:
    """The service refuses such names; a page that meets one all the same shows it."""
    name = "<img src=x onerror=window.bad=1>"
    with serving(with_scripted(Reciting(["yes"]))) as address:
        context = browser.new_context()
        page = context.new_page()
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))

        def state(route: Any) -> None:
            given = route.fetch().json()
            given["models"][0] |= {"name": name, "original": name, "recipe": name}
            route.fulfill(json=given)

        page.route("**/page/state", state)
        page.goto(address)
        page.wait_for_selector("html[data-ready]")
        assert name in page.locator("#model-a").inner_text()
        page.fill("#prompt", "0")
        page.press("#prompt", "Enter")
        page.wait_for_selector("#error:visible")
        page.click("#open-settings")
        page.click("#card-a summary")
        assert name in page.locator("#card-a").inner_text()
        assert page.evaluate("window.bad") is None
        assert page.locator("img").count() == 0
        assert all("404" in one for one in said)
        context.close()


@pytest.mark.slow
def test_every_script_has_its_direction(browser: Any) -> None:
    """Right-to-left and Ethiopic text take the direction of their letters, block by block."""
    texts = ["مرحبا بالعالم\n\nHello world\n\n- واحد\n- two", "ሰላም ዓለም። እንዴት ነህ?", "שלום **עולם**", "Sannu duniya: ƙ, ɓ, ɗ"]

    def check(page: Any, answer: Any, number: int) -> None:
        directions = answer.evaluate("place => [...place.querySelectorAll('p, li')].map("
                                     "one => getComputedStyle(one).direction)")
        assert directions == [["rtl", "ltr", "rtl", "ltr"], ["ltr"], ["rtl"], ["ltr"]][number]
        if number == 0:
            box = answer.bounding_box()
            ends = answer.evaluate("""place => [...place.querySelectorAll('p')].map(one => {
                const range = document.createRange(); range.selectNodeContents(one);
                const lines = range.getBoundingClientRect(); return [lines.left, lines.right]; })""")
            assert ends[0][1] == pytest.approx(box["x"] + box["width"], abs=2)       # Arabic begins at the right
            assert ends[1][0] == pytest.approx(box["x"], abs=2)
        if number == 1:         # Ethiopic letters are drawn, not boxes: each has a width of its own
            assert "ሰላም ዓለም" in answer.inner_text()

    answers_of(browser, texts, check)
