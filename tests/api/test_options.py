"""Options of the calls: one object or keywords, the same by either, and no unknown ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import tsotsallm
from tsotsallm import errors
from tsotsallm.api import analyze, annotate, fit, generate, report, serve, study
from tsotsallm.api.bundle import make_bundle
from tsotsallm.engine.interface import Sampling
from tsotsallm.evaluation.examination import ExaminationKeywords, ExaminationOptions
from tsotsallm.evaluation.options import RunKeywords, RunOptions
from tsotsallm.evaluation.perplexity import PerplexityKeywords, PerplexityOptions
from tsotsallm.records import amended
from tsotsallm.run.work import CompressKeywords, CompressOptions


@pytest.mark.parametrize(("options", "keywords"), [
    (RunOptions, RunKeywords), (PerplexityOptions, PerplexityKeywords), (ExaminationOptions, ExaminationKeywords),
    (analyze.AnalysisOptions, analyze.AnalysisKeywords), (annotate.AnnotationOptions, annotate.AnnotationKeywords),
    (fit.FitOptions, fit.FitKeywords), (Sampling, generate.SamplingKeywords), (report.ReportOptions, report.ReportKeywords),
    (serve.ServiceOptions, serve.ServiceKeywords), (study.StudyOptions, study.StudyKeywords),
    (CompressOptions, CompressKeywords)],
    ids=lambda one: one.__name__)
def test_keywords_are_the_fields_of_the_options(options: type[Any], keywords: type[Any]) -> None:
    fields = get_type_hints(options)
    assert get_type_hints(keywords) == {one.name: fields[one.name] for one in dataclasses.fields(options)}


def test_keywords_stand_in_place_of_what_the_options_say() -> None:
    given = RunOptions("cuda", "here")
    assert amended(given, {"device": "cpu"}, tsotsallm.evaluate) == RunOptions("cpu", "here")
    assert given.device == "cuda"


@pytest.mark.parametrize(("call", "positional", "word", "meant"), [
    (tsotsallm.evaluate, 1, "contxt", "context"), (tsotsallm.examine, 2, "speeds", "speed"),
    (tsotsallm.fit, 2, "window_s", "windows"), (tsotsallm.fit, 2, "faster", "faster_than"),
    (tsotsallm.run_study, 2, "hour", "hours"), (tsotsallm.analyze, 3, "pictures", "picture"),
    (tsotsallm.annotate, 3, "smaller", "smaller_model"), (tsotsallm.write_report, 2, "task", "tasks"),
    (tsotsallm.generate, 2, "topp", "top_p"), (tsotsallm.Conversation, 1, "temprature", "temperature"),
    (generate.generate_many, 3, "token", "tokens"), (serve.serve, 1, "timeout", "timeout_s")],
    ids=lambda one: str(getattr(one, "__name__", one)))
def test_an_unknown_option_is_refused_with_the_nearest_known_one(call: Any, positional: int, word: str, meant: str) -> None:
    with pytest.raises(TypeError, match=f"has no option '{word}'; did you mean '{meant}'"):
        call(*["embedded"] * positional, **{word: 1})


def test_franken_refuses_an_unknown_option() -> None:
    with pytest.raises(TypeError, match="did you mean 'limit'"):
        next(tsotsallm.franken("embedded", limits=3))      # type: ignore[call-arg]


def test_options_and_keywords_evaluate_alike(tiny: Path, text: Path, tmp_path: Path) -> None:
    heard: list[str] = []
    run = RunOptions(scratch=tmp_path, tick=lambda step, _share: heard.append(step))
    by_object = tsotsallm.evaluate(tiny, text, context=64, limit=2, options=run)
    assert heard
    assert by_object == tsotsallm.evaluate(tiny, text, context=64, limit=2, scratch=tmp_path)


def test_a_text_is_continued_alike_by_sampling_and_by_keywords(tiny: Path) -> None:
    sampled = "".join(tsotsallm.generate(tiny, "one", tokens=6, sampling=Sampling(0.8, seed=3)))
    assert sampled == "".join(tsotsallm.generate(tiny, "one", tokens=6, temperature=0.8, seed=3))


def test_a_text_is_needed_where_no_model_brings_one(tiny: Path, tmp_path: Path) -> None:
    for call in (lambda: tsotsallm.evaluate(tiny), lambda: next(tsotsallm.franken(tiny)),
                 lambda: tsotsallm.analyze(tiny, None, tmp_path / "out")):
        with pytest.raises(errors.CorpusError, match="text=FILE; only the embedded model comes with its own"):
            call()
    with pytest.raises(errors.TsotsallmError):
        make_bundle([tmp_path / "none"], tmp_path / "bundle")
