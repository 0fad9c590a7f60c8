"""Pages that work offline: every number is the ledger's or the evaluation's, every picture says in words what it shows."""

from __future__ import annotations

import html
import json
import re
import xml.etree.ElementTree as ET
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import tsotsallm
from tests.study.test_study import spec_of
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.errors import CorpusError, MissingExtraError, ReportError
from tsotsallm.evaluation.examination import text_task
from tsotsallm.inspection import layer_map
from tsotsallm.report import result as report_result
from tsotsallm.report.document import DataTable, Number
from tsotsallm.study.study import open_study, run_study
from tsotsallm.study.verdict import names_of, recipe_in_words

pytest.importorskip("matplotlib", reason="matplotlib is in the extra [report]")


class Page(HTMLParser):
    """What a page holds: rows of tables with exact numbers, links out of it, ids."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.rows: list[list[tuple[str, float | None]]] = []
        self.outside: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.cell: list[str] | None = None
        self.value: float | None = None
        self.text = path.read_text("utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.ids += [str(given["id"])] if "id" in given else []
        for name in ("src", "href", "xlink:href", "action"):
            target = given.get(name)
            if target and target.startswith("#"):
                self.targets.append(target[1:])
            elif target and target != "data:,":
                self.outside.append(target)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.cell, self.value = [], None
        elif tag == "data":
            self.value = float(str(given["value"]))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self.cell is not None:
            self.rows[-1].append(("".join(self.cell), self.value))
            self.cell = None

    def handle_data(self, data: str) -> None:
        if self.cell is not None:
            self.cell.append(data)

    def row(self, start: str) -> list[tuple[str, float | None]]:
        return next(row for row in self.rows if row and row[0][0].startswith(start))


def first_screen(page: Path) -> dict[str, str]:
    """The four facts at the head of a page, as text."""
    found = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page.read_text("utf-8"), re.DOTALL)
    facts = {name: html.unescape(re.sub(r"<[^>]*>", "", text)) for name, text in found}
    assert list(facts) == ["What it is", "How small", "What was lost", "How to run it"]
    return facts


def check_page(page: Page, written: list[Path]) -> None:
    assert not page.outside
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"|http://www.w3.org/[^"<]*', "", page.text.split("application/json")[0])
    assert len(page.ids) == len(set(page.ids))
    assert set(page.targets) <= set(page.ids)
    assert written[0].stat().st_size < 3 << 20
    for path in written[1:]:
        if path.suffix == ".svg":
            root = ET.fromstring(path.read_text("utf-8"))
            title = root.find("{http://www.w3.org/2000/svg}title")
            assert title is not None
            assert len(str(title.text)) > 20                    # what the picture shows, in words
        else:
            assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_study_s_page_tells_the_ledger(tiny: Path, text: Path, tmp_path: Path) -> None:
    run_study(spec_of(text), str(tiny), tmp_path / "study")
    found = open_study(tmp_path / "study")
    written = tsotsallm.write_report([tmp_path / "study"], tmp_path / "page.html")
    page = Page(written[0])
    check_page(page, written)
    names = names_of(found.trials)
    assert set(names.values()) == {"3 bits by rounding", "8 bits by rounding", "1 layer fewer + 3 bits by rounding",
                                   "1 layer fewer + 8 bits by rounding"}
    for trial in found.trials:
        name = f"{trial.number}: {names[trial.number]}"
        row = page.row(name) if trial not in found.front else [
            row for row in page.rows if row and row[0][0].startswith(name)][-1]
        values = [value for _, value in row if value is not None]
        assert values[:2] == [trial.measure("kl"), trial.measure("perplexity")]
        assert values[2:] == [trial.measure("bytes"), trial.facts["seconds"]]
    for trial in found.front:
        row = page.row(f"{trial.number}: {names[trial.number]}")
        assert [value for _, value in row if value is not None] == [
            trial.measure(name) for name in ("kl", "perplexity", "bytes", "nonzero_parameters")]
        assert (tmp_path / "page-pictures" / f"layers-{trial.number}.svg").exists()
    embedded = json.loads(page.text.split('application/json" id="data">')[1].split("</script>")[0])
    assert embedded["trials"] == json.loads(json.dumps([trial.plain() for trial in found.trials]))
    for note in ("plan", "implement", "revise", "re-implement"):
        assert page.row(f"0, {note}")
    first = first_screen(written[0])
    assert "A study of" in first["What it is"]
    assert f"{len(found.trials)} recipes tried" in first["What it is"]
    least = min(found.front, key=lambda trial: trial.measures["full"]["kl"])
    assert f"with {names[least.number]}" in first["What was lost"]
    assert "KL divergence from the original, nats per token" in first["What was lost"]
    assert re.search(r"On the front: [\d.]+ .B \(\d+% of the original\)", first["How small"])
    assert f"tsotsallm compress {tiny}" in first["How to run it"]
    assert first["How to run it"].endswith("tsotsallm chat result")
    svg = (tmp_path / "page-pictures" / "front.svg").read_text("utf-8")
    full = [trial for trial in found.trials if trial.level == "full"]
    assert svg.count('class="tip"') == len(full)
    for trial in full:
        assert f"{trial.number}: {names[trial.number]}" in svg


def test_results_side_by_side(tiny: Path, text: Path, tmp_path: Path) -> None:
    tsotsallm.compress(tiny, [{"layers": {"order": [0, 2, 2, 1]}}, "rtn:4:channel"], tmp_path / "one")
    tsotsallm.compress(tmp_path / "one", [{"layers": {"order": [3, 0]}}], tmp_path / "two")
    written = tsotsallm.write_report([tmp_path / "one", tmp_path / "two"], tmp_path / "page.html", reference=tiny,
                                     text=text, limit=4, tokens=3)
    page = Page(written[0])
    check_page(page, written)
    models = [tiny, tmp_path / "one", tmp_path / "two"]
    found = tsotsallm.examine(models, [text_task()], data=text, limit=4, reference=tiny)
    for one in found.comparisons:
        numbers = [value for _, value in page.row(f"{one.task}: {one.measure}") if value is not None]
        expected = [one.scores[0].value]
        for score, difference in zip(one.scores[1:], one.differences[1:], strict=True):
            assert difference is not None
            expected += [score.value, difference.value]
        assert numbers == expected
    assert [value for _, value in page.row("bytes on disk") if value is not None] == [
        Checkpoint.open(model).weight_bytes - _header(model) for model in models]
    first = layer_map(Checkpoint.open(tmp_path / "one"))
    assert (first.layers, first.runs) == (4, (0, 2, 2, 1))
    assert {round(bits) for bits in first.bits[0].values()} == {4}
    assert asdict(layer_map(Checkpoint.open(tmp_path / "two")))["runs"] == (1, 0)
    svg = (tmp_path / "page-pictures" / "layers-1.svg").read_text("utf-8")
    assert "2 layers run, of 4. Removed: 2, 3." in svg
    assert "They run in the order 1, 0" in svg
    assert "rtn" in page.text
    assert page.text.count('<article class="sample">') == 4


def test_the_headline_has_the_loss_and_the_recipe_stands_once(tiny: Path, text: Path, tmp_path: Path) -> None:
    tsotsallm.compress(tiny, ["rtn:4:channel"], tmp_path / "small")
    [page, *_] = tsotsallm.write_report([tmp_path / "small"], tmp_path / "page.html", reference=tiny, text=text, limit=3,
                                        tokens=2)
    shown = page.read_text("utf-8").partition('<script type="application/json"')[0]
    glance = first_screen(page)
    assert "made smaller: 4 bits by rounding." in glance["What it is"]
    assert "of the original's bytes" in glance["How small"]
    assert "KL divergence from the original" in glance["What was lost"]
    assert "±" in glance["What was lost"]
    assert f"tsotsallm chat {tmp_path / 'small'}" in glance["How to run it"]
    assert shown.count("method: rtn") == 1
    assert not re.search(r"0\.0+ ± 0\.0+\b", shown)


@pytest.mark.parametrize(("recipe", "words"), [
    ([{"depth": {"remove": 2}}, {"quantize": {"grid": "q4_k"}}], "2 layers fewer + q4_k"),
    ([{"depth": {"remove": 0}}, {"quantize": {"grid": "q3_k"}}], "q3_k"),
    ([{"layers": {"skip": [3]}}, {"sparsity": {"prune": 1, "group": 4}}, {"quantize": {"grid": "int", "bits": 4}}],
     "1 layer fewer + 1 of 4 weights zero + 4 bits"),
    ([{"quantize": {"grid": "q4_0", "method": "rtn"}}, {"compensate": {"rank": 8}}],
     "q4_0 by rounding + correction of rank 8"),
    ([{"something": {"new": 1}}], "something"), ([], "as it is")])
def test_recipes_have_readable_names(recipe: list[dict[str, Any]], words: str) -> None:
    assert recipe_in_words(recipe) == words


@pytest.mark.parametrize(("number", "shown"), [
    (Number.share(0.5, 0.012), "50.0 % ± 1.2"), (Number.share(0.99987, 0.00004), "99.9870 % ± 0.0040"),
    (Number.share(0.5, None), "50.0 %"), (Number.share(0.0, 0.0), "0 % ± 0"),
    (Number.difference(-0.0312, -0.05, -0.012), "-0.031 [-0.050, -0.012]"),
    (Number.difference(0.00002, -0.00001, 0.00005, mark="≈ "), "≈ +0.000020 [-0.000010, 0.000050]"),
    (Number.difference(0.012, 0.001, 0.023, scale=100.0), "+1.2 [0.1, 2.3]"),
    (Number.difference(0.0, 0.0, 0.0), "+0 [0, 0]")])
def test_numbers_have_significant_digits(number: Number, shown: str) -> None:
    assert number.shown + number.error == shown


def test_many_models_have_a_row_each(tiny: Path, text: Path, tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        tsotsallm.compress(tiny, ["rtn:8:channel"], tmp_path / name)
    names = ["one", "two", "three"]
    [path, *_] = tsotsallm.write_report([tmp_path / name for name in names], tmp_path / "page.html", reference=tiny,
                                        text=text, limit=3, tokens=2)
    page = Page(path)
    scored = [row for row in page.rows if row and row[0][0].endswith(": perplexity")]
    assert [row[1][0] for row in scored] == [tiny.name, *names]
    assert max(map(len, page.rows)) <= 10
    assert page.row("three")[1][1] is not None


@pytest.mark.parametrize(("before", "named"), [([], "original"), ([{"layers": {"skip": [0]}}], "all layers")])
def test_importance_by_perplexity_stands_beside_that_of_all_layers(
        before: list[Any], named: str, tiny: Path, text: Path, tmp_path: Path) -> None:
    """A result that does not say it has no line."""
    depth = {"remove": 1, "protect": {"first": 0, "last": 0}}
    tsotsallm.compress(tiny, [*before, {"depth": depth}], tmp_path / "small", calibration=text, windows=2, window=32)
    tsotsallm.write_report([tmp_path / "small"], tmp_path / "page.html")
    picture = tmp_path / "page-pictures" / "importance-0-perplexity.svg"
    made = tmp_path / "small" / "tsotsallm.json"
    provenance = json.loads(made.read_text("utf-8"))
    whole = provenance["choices"][-1]["rounds"][0].pop("whole")
    assert f"The dashed line, {named}: {whole:.4g}." in picture.read_text("utf-8")
    assert "the dashed line is the model with all layers" in (tmp_path / "page.html").read_text("utf-8")
    made.write_text(json.dumps(provenance), "utf-8")
    tsotsallm.write_report([tmp_path / "small"], tmp_path / "page.html")
    assert "dashed line" not in picture.read_text("utf-8")


def test_a_study_s_importance_stands_beside_that_of_all_layers(tiny: Path, text: Path, tmp_path: Path) -> None:
    stages = [{"depth": {"remove": 1, "importance": "perplexity", "protect": {}}},
              {"quantize": {"method": "rtn", "bits": 8, "group": "channel"}}]
    run_study(spec_of(text, stages=stages), str(tiny), tmp_path / "study")
    [trial] = open_study(tmp_path / "study").trials
    tsotsallm.write_report([tmp_path / "study"], tmp_path / "page.html")
    svg = (tmp_path / "page-pictures" / "importance-perplexity.svg").read_text("utf-8")
    assert f"The dashed line, original: {trial.facts['importance_of_whole']['perplexity']:.4g}." in svg


def test_a_page_that_cannot_be_written_is_refused_before_anything_is_evaluated(
        tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise MissingExtraError("matplotlib", "report", "drawing pictures")

    with pytest.raises(ReportError, match=r"does not end in \.html"):
        tsotsallm.write_report([tmp_path / "no-such-model"], tmp_path / "page.txt")
    monkeypatch.setattr("tsotsallm.report.page.pyplot", missing)
    with pytest.raises(MissingExtraError, match="matplotlib"):
        tsotsallm.write_report([tmp_path / "no-such-model"], tmp_path / "page.html")


def test_a_missing_text_is_named_with_its_option(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"text \S*nowhere\.txt does not exist"):
        tsotsallm.write_report([tiny], tmp_path / "page.html", text=tmp_path / "nowhere.txt")


def _header(model: Path) -> int:
    """Bytes of the shards that are no tensors."""
    return sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in model.glob("*.safetensors"))


def test_hostile_names_stay_text(tiny: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "<img src=x onerror=alert(1)>"
    tsotsallm.compress(tiny, ["rtn:8:channel"], out)
    page = Page(tsotsallm.write_report([out], tmp_path / "page.html")[0])
    assert "<img" not in page.text
    assert not page.outside


@pytest.mark.parametrize(("change", "message"), [
    ({"out": "page.txt"}, "does not end in .html"), ({"paths": ["study"], "text": "some.txt"}, "from its ledger alone")])
def test_what_cannot_be_reported(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "trials.jsonl").write_text("")
    given = {"paths": ["embedded"], "out": "page.html"} | change
    if given["paths"] == ["study"]:
        given["paths"] = [str(tmp_path / "study")]
    elif "text" not in given:
        given["limit"] = 1
        given["tokens"] = 1
    with pytest.raises(ReportError, match=message):
        tsotsallm.write_report(given.pop("paths"), tmp_path / given.pop("out"), **given)


def test_answers_to_instructions_stand_side_by_side(tmp_path: Path) -> None:
    """What is wrong with an answer stands under it; the shares are those of the examination."""
    tsotsallm.compress("embedded", "rtn:2:64", tmp_path / "two")
    tsotsallm.write_report([tmp_path / "two"], tmp_path / "page.html", reference="embedded", tasks=["instructions"], limit=2)
    page = html.unescape((tmp_path / "page.html").read_text("utf-8"))
    examined = tsotsallm.examine(["embedded", tmp_path / "two"], ["instructions"], limit=2)
    found = examined.results[0]
    for result in found:
        for one in result.exchanges:
            assert f"“{one.prompt}”" in page
            assert f"<p>{one.reply}</p>" in page
    rows = Page(tmp_path / "page.html").rows
    [side] = [row for row in rows if row and row[0][0] == "kind of instruction"]
    measures = [measure.name for measure in found[0].measures if measure.share]
    assert len(side) == 1 + 2 * len(measures)
    four = replace(examined, results=((*found, *found),))
    names = ["one", "two", "three", "four"]
    [section] = report_result.answered_sections(names, [four])
    table = section.blocks[1]
    assert isinstance(table, DataTable)
    assert list(table.header) == ["kind of instruction", "model", *measures]
    kinds = list(dict.fromkeys(found[0].groups)) if len(set(found[0].groups)) > 1 else []
    assert [tuple(row[:2]) for row in table.rows] == [(kind, name) for kind in ("all", *kinds) for name in names]
    assert table.marks == {0, 1, 2, 3}
    scores = {score.measure: score.value for score in found[1].scores if not score.group}
    assert [cell.value for cell in table.rows[1][2:] if isinstance(cell, Number)] == [scores[name] for name in measures]
    wrong = sum(not one.features["stops"] or one.features["repeats"] or not one.features["follows"]
                for result in found for one in result.exchanges)
    assert page.count('class="wrong"') == page.count('class="remark"') == wrong > 0


def test_a_long_recipe_is_folded(tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tsotsallm.compress(tiny, "rtn:4:32", tmp_path / "small", calibration=text)
    for most, folded in ((30, False), (0, True)):
        monkeypatch.setattr(report_result, "LONG_RECIPE", most)
        tsotsallm.write_report([tmp_path / "small"], tmp_path / f"{most}.html", text=text, limit=2, tokens=2)
        page = (tmp_path / f"{most}.html").read_text("utf-8")
        assert page.count("The recipe of small, as recipe.yaml") == 1
        assert ("<details><summary>The recipe of small, as recipe.yaml" in page) == folded
