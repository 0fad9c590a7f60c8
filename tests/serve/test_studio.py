"""What the studio plans and starts, without a browser: texts, sizes that cannot be reached, models that fit already."""

from __future__ import annotations

import json
import shutil
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

import tsotsallm
from tests.conftest import build
from tests.serve.running import serving, until
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.errors import ServeError, StudyError, TsotsallmError
from tsotsallm.evaluation.cost import THIS_COMPUTER
from tsotsallm.fit.target import usual_target
from tsotsallm.inspection import inspect_checkpoint
from tsotsallm.serve import guard
from tsotsallm.serve import jobs as running
from tsotsallm.serve.answering import Refused
from tsotsallm.serve.guard import LARGE, Rules
from tsotsallm.serve.jobs import Jobs, StudioJob
from tsotsallm.serve.served import Models
from tsotsallm.serve.wishes import Maker, Wish
from tsotsallm.units import human_bytes


@pytest.fixture
def maker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Maker:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    build(tmp_path / "model", "llama3")
    (tmp_path / "prose.txt").write_text("The river of words runs on. " * 2000)
    jobs = Jobs(tmp_path)
    monkeypatch.setattr(jobs, "_start_next", lambda: None)
    return Maker(jobs)


def test_a_text_is_offered_where_the_usual_one_is_out_of_reach(maker: Maker) -> None:
    wish: dict[str, Any] = {"model": "model", "recipe": "gptq:q4_0"}
    assert maker.choices()["texts"] == ["prose.txt"]
    assert maker.plan(Wish(**wish))["needs_text"]
    with pytest.raises(ServeError, match="what the model writes itself, or a text"):
        maker.start(Wish(**wish))
    for chosen, named in (("self", "self"), ("prose.txt", str(maker.folder / "prose.txt"))):
        planned = maker.plan(Wish(**wish, calibration=chosen))
        assert not planned["needs_text"]
        assert f"--calibration {named}" in str(planned["command"])
        assert maker.start(Wish(**wish, calibration=chosen)).arguments[-3:] == ["--calibration", named, "--json"]
    assert not maker.plan(Wish(**wish | {"recipe": "rtn:q4_0"}))["needs_text"]
    assert not maker.plan(Wish(**wish | {"model": "embedded"}))["needs_text"]
    assert maker.plan(Wish(model="model", bytes="100kB"))["needs_text"]
    with pytest.raises(Refused, match="there is no text"):
        maker.plan(Wish(**wish, calibration="../../etc/passwd"))


def test_what_fits_already_or_never_is_said_with_the_plan(maker: Maker) -> None:
    assert maker.choices()["devices"][0]["name"] == THIS_COMPUTER        # type: ignore[index]
    [warning] = maker.plan(Wish(model="model", device=THIS_COMPUTER))["warnings"]     # type: ignore[misc]
    assert "fits this-computer already" in warning
    for ask in (maker.plan, maker.start):
        with pytest.raises(StudyError, match="smallest that this model can become here"):
            ask(Wish(model="model", bytes="1kB", calibration="self"))


def test_without_a_goal_it_is_this_computer(maker: Maker) -> None:
    """As `tsotsallm fit MODEL` alone: by the forecast's minutes, and on what a model that converses writes itself."""
    wish = Wish(model="model", calibration="prose.txt")
    planned = maker.plan(wish)
    facts = {fact["key"]: fact["value"] for fact in planned["facts"]}      # type: ignore[attr-defined]
    target = usual_target(Checkpoint.open(maker.folder / "model"), "model").bytes
    assert facts["target"] == human_bytes(target)
    job = maker.start(wish)
    assert "--bytes" not in job.arguments
    assert "--device" not in job.arguments
    minutes = float(job.arguments[job.arguments.index("--minutes") + 1])
    assert facts["time"] == f"≤ {minutes:g} min"
    assert job.limit_s == 60 * minutes
    assert job.before == inspect_checkpoint(Checkpoint.open(maker.folder / "model")).bytes
    with pytest.raises(ServeError, match="2 goals are given"):
        maker.plan(Wish(model="model", bytes="1MB", recipe="rtn:4"))


def test_a_model_may_be_a_gguf_file(maker: Maker) -> None:
    tsotsallm.to_gguf(maker.folder / "model", maker.folder / "file.gguf", verify=False)
    (maker.folder / "fitted").mkdir()
    shutil.copytree(maker.folder / "model", maker.folder / "fitted" / "model")
    for name in ("fitted/model.gguf", "parts-00002-of-00003.gguf"):        # of that checkpoint; not the first part
        shutil.copyfile(maker.folder / "file.gguf", maker.folder / name)
    (maker.folder / "broken.gguf").write_bytes(b"GGUF")
    listed = [one["id"] for one in maker.choices()["models"]]       # type: ignore[attr-defined]
    assert listed == ["embedded", "file.gguf", "model", "fitted/model"]
    job = maker.start(Wish(model="file.gguf", recipe="rtn:q4_0"))
    assert job.arguments[:2] == ["compress", str(maker.folder / "file.gguf")]
    assert Path(job.out).name == "file-recipe"
    assert maker.is_here(job.source)


def test_texts_are_added_under_names_of_ours(maker: Maker) -> None:
    prose = "Un fleuve de mots. " * 400
    assert maker.add_text(b"\xef\xbb\xbf" + prose.encode(), "txt") == {"id": "texts/text-1.txt", "bytes": len(prose) + 3}
    assert (maker.folder / "texts" / "text-1.txt").read_text("utf-8") == prose
    chat = b'{"prompt": "Name a river.", "response": "The Tamsin."}\n'
    assert maker.add_text(chat, "jsonl")["id"] == "texts/text-2.jsonl"
    for content, kind, words in ((b"\xff\xfe\x00", "txt", "not text in UTF-8"), (b" \n", "txt", "is empty"),
                                 (b'{"no": "turns"}\n', "jsonl", "line 1")):
        with pytest.raises(TsotsallmError, match=words):
            maker.add_text(content, kind)
    assert sorted(maker.texts()) == ["prose.txt", "texts/text-1.txt", "texts/text-2.jsonl"]
    job = maker.start(Wish(model="embedded", bytes="6MB", minutes=3, calibration="texts/text-2.jsonl",
                           keep=["texts/text-1.txt"]))
    assert job.arguments[job.arguments.index("--keep-text") + 1] == str(maker.folder / "texts" / "text-1.txt")
    with pytest.raises(ServeError, match="vocabulary"):
        maker.plan(Wish(model="model", recipe="rtn:4", keep=["texts/text-1.txt"]))
    with pytest.raises(Refused, match="there is no text"):
        maker.plan(Wish(model="model", bytes="150kB", keep=["../secret.txt"]))


def test_candidates_and_results_are_heard(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    job = StudioJob("1", "a fit", ["fit"], str(tmp_path))
    for number, kl in ((0, 0.3), (1, 0.2), (1, 0.1)):
        jobs._hear(job, json.dumps({"candidate": {"number": number, "name": "all", "bytes": 5, "kl": kl, "error": 0.01}}))
    jobs._hear(job, '{"step": "quantize 2/3 editing", "share": 0.5, "stage": "quantize", "layer": 2, "layers": 3}')
    jobs._hear(job, '{"step": torn')
    assert [(one["number"], one["kl"]) for one in job.candidates] == [(0, 0.3), (1, 0.1)]
    assert (job.step, job.share, job.lines) == ("quantize 2/3 editing", 0.5, ['{"step": torn'])
    assert (job.at["stage"], job.at["layer"], job.at["layers"]) == ("quantize", 2, 3)
    assert running._result_in('{"result_bytes": 7, "stages": []}') == {"bytes": 7}
    assert running._result_in('{"fits_already": true}') is None
    assert running._result_in("no JSON") is None


def test_the_bar_of_a_job_with_a_limit_is_its_time(tmp_path: Path) -> None:
    """The work of a search begins at zero with every candidate."""
    job = StudioJob("1", "a fit", ["fit"], str(tmp_path), share=0.02, began=time.monotonic() - 30, limit_s=100.0)
    assert job.plain()["share"] == pytest.approx(0.3, abs=0.05)
    job.limit_s = 10.0
    assert job.plain()["share"] == 1.0
    job.limit_s = None
    assert job.plain()["share"] == 0.02


@pytest.mark.parametrize(("wish", "field"), [
    ({"bytes": "lots"}, "bytes"), ({"bytes": "1kB", "calibration": "self"}, "bytes"), ({"device": "pi9"}, "device"),
    ({"device": THIS_COMPUTER}, "device"), ({"recipe": "nonsense:4"}, "recipe"), ({"recipe": "depth:40"}, "recipe"),
    ({"recipe": "gptq:q4_0"}, "calibration"), ({"recipe": "rtn:4", "keep": ["prose.txt"]}, "keep"),
    ({"model": "hub:no name"}, "model"), ({"bytes": "1MB", "recipe": "rtn:4"}, None)])
def test_a_refusal_names_the_field_of_the_wish(maker: Maker, wish: dict[str, Any], field: str | None) -> None:
    with pytest.raises(TsotsallmError) as found:
        maker.start(Wish(**{"model": "model"} | wish))
    assert found.value.param == field


def test_the_field_reaches_the_page(tmp_path: Path) -> None:
    with serving(Models(), studio=tmp_path) as address:
        request = urllib.request.Request(f"{address}/studio/plan", b'{"model": "embedded", "bytes": "lots"}',
                                         {"Content-Type": "application/json"})
        with pytest.raises(urllib.error.HTTPError) as found:
            urllib.request.urlopen(request, timeout=30)
        assert json.loads(found.value.read())["error"]["param"] == "bytes"


def test_large_bodies_are_for_texts_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LARGE, "/studio/texts", 60_000)
    with serving(Models(), Rules(body_bytes=1000), studio=tmp_path) as address:
        def sent(path: str, size: int) -> int:
            request = urllib.request.Request(address + path, b"word " * (size // 5), {"Content-Type": "text/plain"})
            try:
                with urllib.request.urlopen(request) as answer:
                    return int(answer.status)
            except urllib.error.HTTPError as error:
                return error.code

        assert sent("/studio/texts", 50_000) == 201
        assert sent("/studio/texts?kind=html", 500) == 400
        assert sent("/studio/plan", 50_000) == 413
        assert sent("/studio/texts", 60_005) == 413
        assert [path.name for path in (tmp_path / "texts").iterdir()] == ["text-1.txt"]


def test_the_clock_of_a_job_ticks_while_it_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "PATIENCE_S", 1.0)
    silent = [sys.executable, "-c", "import time; time.sleep(60)"]
    started = running.subprocess.Popen
    monkeypatch.setattr(running.subprocess, "Popen", lambda _command, **how: started(silent, **how))
    jobs = Jobs(tmp_path)
    job = jobs.add("silent", ["compress"], tmp_path / "out")
    until(lambda: float(str(job.plain()["seconds"])) > 0.3, 30)
    before = float(str(job.plain()["seconds"]))
    time.sleep(0.3)
    assert float(str(job.plain()["seconds"])) > before
    jobs.stop(job)
    until(lambda: job.state == "stopped", 60)
    taken = job.plain()["seconds"]
    time.sleep(0.3)
    assert job.plain()["seconds"] == taken == Jobs(tmp_path).jobs[job.id].seconds


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of two finished jobs of the studio in tmp_path, with files."""
    jobs = Jobs(tmp_path)
    monkeypatch.setattr(jobs, "_start_next", lambda: None)
    made = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.gguf").write_bytes(name.encode() * 1000)
        made.append(jobs.add(name, ["compress"], tmp_path / name))
        made[-1].state = "done"
    jobs._keep()
    return [job.id for job in made]


def test_a_link_to_a_file_needs_no_key(tmp_path: Path, finished: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is signed: for one file, for reading, for some hours, by this service alone."""
    key = {"Authorization": "Bearer a-key-of-tests"}

    def status(path: str, method: str = "GET", **headers: str) -> tuple[int, bytes]:
        body = b"{}" if method == "POST" else None
        request = urllib.request.Request(address + path, body, {"Content-Type": "application/json"} | headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as found:
                return found.status, found.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    one, other = (f"/studio/jobs/{name}" for name in finished)
    with serving(Models(), Rules(key="a-key-of-tests"), studio=tmp_path) as address:
        assert status(f"{one}/file")[0] == 401
        assert status(f"{one}/link", "POST")[0] == 401
        assert status("/studio/jobs/none/link", "POST", **key)[0] == 404
        link = json.loads(status(f"{one}/link", "POST", **key)[1])["href"]
        assert status(link) == (200, b"one" * 1000)
        assert status(link, Range="bytes=3-5") == (206, b"one")
        until, proof = (part.partition("=")[2] for part in link.partition("?")[2].split("&"))
        for wrong in (link.replace(one, other), link.replace(f"{one}/file", one), f"{one}/file?until={until}",
                      f"{one}/file?until={int(until) + 1}&proof={proof}", f"{one}/file?until={until}&proof={'0' * 64}",
                      f"{one}/file?until=²&proof={proof}".replace("²", "%C2%B2"), f"{one}/file?proof={proof}"):
            assert status(wrong)[0] == 401, wrong
        assert status(link.replace("/file", "/link"), "POST")[0] == 401
        monkeypatch.setattr(guard.time, "time", lambda: int(until) + 1.0)
        assert status(link)[0] == 401
    monkeypatch.undo()
    with serving(Models(), Rules(key="a-key-of-tests"), studio=tmp_path) as address:
        assert status(link)[0] == 401
