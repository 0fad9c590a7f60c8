"""Tables and progress for people: nothing is cut at 80 columns, progress never falls, and a pipe hears of every layer."""

from __future__ import annotations

import json

import pytest

from tsotsallm.cli import lines
from tsotsallm.run.work import Progress


def passing(sweep: int, layer: int, share: float, layers: int = 3) -> Progress:
    return Progress(sweep, 2, "quantize", layer, layers, "editing", share)


def test_a_table_that_fits_puts_numbers_to_the_right_and_words_to_the_left(
        capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines.table("[a] title", ["name", "kind", "bytes"], [["world-text", "perplexity", "1.5 MB"], ["x", "qa", "12.25 MB"]])
    shown = capsys.readouterr().out
    assert "[a] title" in shown
    assert "│ world-text │ perplexity │   1.5 MB │" in shown
    assert "│ x          │ qa         │ 12.25 MB │" in shown


def test_prose_is_wrapped_between_words(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    lines.table("", ["task", "about"], [["arc-easy", "Questions of science exams of the third to the ninth grade"]])
    shown = capsys.readouterr().out
    assert "│ arc-easy │ Questions of science exams" in shown
    assert all(word in shown for word in ("science", "grade"))
    assert max(map(len, shown.splitlines())) <= 60


def test_a_table_that_does_not_fit_becomes_paragraphs_in_which_nothing_is_cut(
        capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    cells = ["world-closed", "right answers", "200", "76.0 ± 3.0 %", "74.0 ± 3.1 %", "-2.0 [-7.5, 3.5] p 0.52"]
    header = ["task", "measure", "items", "embedded", "compressed", "compressed − embedded"]
    lines.table("Scores", header, [cells])
    shown = capsys.readouterr().out
    assert all(text in shown for text in (*cells, *header[1:]))
    assert "  compressed − embedded  -2.0 [-7.5, 3.5] p 0.52" in shown.splitlines()


def test_the_share_of_a_walk_never_falls_and_every_walk_has_a_bar_of_its_own() -> None:
    walks = lines._Walks()
    places = [passing(0, layer, share) for _survey_and_edits in range(2) for layer in range(3) for share in (0.5, 0.2, 0.9)]
    found = [walks.of(place) for place in places]
    assert [number for number, _, _ in found] == [0] * 9 + [1] * 9
    for walk in range(2):
        shares = [share for number, _, share in found if number == walk]
        assert shares == sorted(shares)
    assert walks.of(passing(1, 0, 0.0))[0] == 2


def test_steps_without_layers_begin_again_only_after_they_were_done() -> None:
    walks = lines._Walks()
    shares = [0.0, 0.5, 0.0, 1.0, 0.0, 0.5]
    found = [walks.of(passing(0, 0, share, layers=0)) for share in shares]
    assert [(number, share) for number, _, share in found] == [(0, 0.0), (0, 0.5), (0, 0.5), (0, 1.0), (1, 0.0), (1, 0.5)]


def test_a_pipe_gets_a_line_for_every_layer(capsys: pytest.CaptureFixture[str]) -> None:
    bar, show = lines.progress_bar(quiet=False)
    with bar:
        for layer in range(3):
            for share in (0.1, 0.5, 1.0):
                show(passing(0, layer, share))
    assert capsys.readouterr().err.splitlines() == ["quantize 1/3", "quantize 2/3", "quantize 3/3"]


def test_programs_get_json_even_where_people_see_nothing(capsys: pytest.CaptureFixture[str],
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSOTSALLM_PROGRESS", "1")
    bar, show = lines.progress_bar(quiet=True)
    with bar:
        show(passing(1, 2, 1.0))
    assert json.loads(capsys.readouterr().err) == {
        "step": "quantize 3/3 editing", "share": 0.9833, "stage": "quantize", "layer": 3, "layers": 3, "done": 0.9667}


def test_what_comes_before_a_sweep_has_its_own_share(capsys: pytest.CaptureFixture[str],
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """While a model writes its text, or a candidate is compared, nothing is known of the whole."""
    monkeypatch.setenv("TSOTSALLM_PROGRESS", "1")
    bar, show = lines.progress_bar(quiet=True)
    with bar:
        show(Progress(-1, 1, "comparing with the original:", 0, 0, "", 0.4))
    said = json.loads(capsys.readouterr().err)
    assert (said["stage"], said["layers"], said["share"], said["done"]) == ("comparing with the original", 0, 0.0, 0.4)


def test_quiet_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    bar, show = lines.progress_bar(quiet=True)
    with bar:
        show(passing(0, 0, 0.5))
    steps, tick = lines.step_bar(quiet=True)
    with steps:
        tick("scoring", 0.5)
    captured = capsys.readouterr()
    assert captured.err + captured.out == ""


def test_models_are_named_by_the_last_part_unless_that_is_the_same() -> None:
    assert lines.short_names(["embedded", "runs/tiny"]) == ["embedded", "tiny"]
    assert lines.short_names(["a/tiny", "b/tiny"]) == ["a/tiny", "b/tiny"]
