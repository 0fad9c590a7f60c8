"""OpenAI's own client and curl against the service; the same text through service, command line and library."""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from typer.testing import CliRunner

import tsotsallm
from tests.serve.running import serving
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.cli import app
from tsotsallm.engine.interface import Question, Sampling, said
from tsotsallm.serve import served
from tsotsallm.serve.guard import Rules
from tsotsallm.serve.served import Loading, Models, load, load_all, name_of

openai = pytest.importorskip("openai", reason="OpenAI's client is in the extra [dev]")
pytest.importorskip("xllamacpp", reason="xllamacpp is in the extra [llama]")
KEY = "a-key-of-tests"
PROMPT = "Question: Where was Ada born? Answer:"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    tsotsallm.to_gguf("embedded", path, dense="f32", verify=False)
    return path


@pytest.fixture(scope="module")
def models(file: Path, stories_or_none: Path | None) -> Models:
    found = Models()
    how = Loading(slots=1, keep_prompt=False)
    load_all([f"file={file}", "embedded"], how, found, lambda _line: None)
    if stories_or_none is not None:
        found.add(load(str(stories_or_none), "stories", how))
    return found


@pytest.fixture(scope="module")
def stories_or_none() -> Path | None:
    from tests.conftest import SHARED

    path = SHARED / "models" / "stories260k"
    return path if path.exists() else None


@pytest.fixture(scope="module")
def address(models: Models) -> Iterator[str]:
    with serving(models, Rules(key=KEY)) as found:
        yield found


@pytest.fixture(scope="module")
def client(address: str) -> Any:
    return openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)


@pytest.mark.parametrize("model", ["file", "embedded"])
def test_the_official_client(client: Any, models: Models, model: str) -> None:
    asked = {"model": model, "messages": [{"role": "user", "content": "Where was Ada born?"}], "temperature": 0,
             "max_tokens": 12}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    [choice] = whole.choices
    expected = said(models.by_name[model].speaker, Question(tuple(asked["messages"]), 12))
    assert choice.message.content == expected
    assert choice.finish_reason in ("stop", "length")
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert "".join(bytes(one.bytes).decode() for one in choice.logprobs.content) == expected
    for one in choice.logprobs.content:
        assert len(one.top_logprobs) == 3
        assert one.top_logprobs[0].logprob >= one.logprob - 1e-6
    chunks = list(client.chat.completions.create(**asked, stream=True, logprobs=True, top_logprobs=3,
                                                 stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
    told = [one.logprob for chunk in chunks if chunk.choices and chunk.choices[0].logprobs
            for one in chunk.choices[0].logprobs.content]
    assert told == pytest.approx([one.logprob for one in choice.logprobs.content], abs=1e-3)
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].timings["seconds"] > 0
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == choice.finish_reason


@pytest.mark.parametrize("model", ["file", "embedded"])
def test_continuations(client: Any, models: Models, model: str) -> None:
    one = models.by_name[model].speaker
    plain = said(one, Question(PROMPT, 20))
    found = client.completions.create(model=model, prompt=PROMPT, max_tokens=20, temperature=0, logprobs=2)
    assert found.choices[0].text == plain
    told = found.choices[0].logprobs
    assert "".join(told.tokens) == plain
    assert [plain[at:at + len(token)] for at, token in zip(told.text_offset, told.tokens, strict=True)] == told.tokens
    chunks = list(client.completions.create(model=model, prompt=PROMPT, max_tokens=20, temperature=0, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == plain
    stop = plain.split()[1]
    cut = client.completions.create(model=model, prompt=PROMPT, max_tokens=20, temperature=0, stop=[stop])
    assert cut.choices[0].text == plain[:plain.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    several = client.completions.create(model=model, prompt=[PROMPT, "Once"], max_tokens=4, temperature=1, n=2, seed=7)
    again = client.completions.create(model=model, prompt=PROMPT, max_tokens=4, temperature=1, seed=8)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[1].text == again.choices[0].text
    ids = client.completions.create(model=model, prompt=one.tokenize(PROMPT), max_tokens=20, temperature=0)
    assert ids.choices[0].text == plain


def test_errors_are_the_client_s_own(client: Any, address: str) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    with pytest.raises(openai.NotFoundError, match="there are: file, embedded"):
        client.chat.completions.create(model="../../etc/passwd", messages=messages)
    with pytest.raises(openai.AuthenticationError, match="key is missing or wrong"):
        openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0).models.list()
    for change, message in (({"temperature": -1}, "temperature"), ({"max_tokens": 0}, "max_tokens"),
                            ({"messages": []}, "messages"), ({"messages": [{"role": "cook", "content": "x"}]}, "role"),
                            ({"tools": [{"type": "function"}]}, "tools"), ({"frequency_penalty": 2.5}, "frequency_penalty"),
                            ({"response_format": {"type": "xml"}}, "response_format"), ({"functions": [{"name": "x"}]},
                            "tools"),
                            ({"logit_bias": {"99999999": 1}}, "token 99999999"),
                            ({"messages": [{"role": "user", "content": "word " * 9000}]}, "token")):
        with pytest.raises(openai.BadRequestError, match=message):
            client.chat.completions.create(**({"model": "file", "messages": messages} | change))
        with pytest.raises(openai.BadRequestError, match=message):      # before a stream begins
            client.chat.completions.create(**({"model": "embedded", "messages": messages, "stream": True} | change))


@pytest.mark.parametrize("model", ["file", "embedded"])
def test_how_tokens_are_chosen(client: Any, models: Models, model: str) -> None:
    """Every field reaches the engine: alone each changes the answer, as the library is changed by it."""
    one = models.by_name[model].speaker
    ids = one.tokenize(PROMPT)
    banned = ids[-1]
    plain = said(one, Question(PROMPT, 24))
    for sent, how in (({"presence_penalty": 1.5}, {}), ({"frequency_penalty": -1.5}, {}), ({"repetition_penalty": 1.4}, {}),
                      ({"repeat_penalty": 1.4}, {"repetition_penalty": 1.4}),
                      ({"repeat_penalty": 1.4, "repeat_last_n": -1}, {"repetition_penalty": 1.4,
                      "repeat_last_n": one.context}),
                      ({"logit_bias": {str(banned): 50}}, {"logit_bias": ((banned, 50.0),)})):
        expected = said(one, Question(PROMPT, 24, Sampling(**(how or sent))))
        assert expected != plain
        found = client.completions.create(model=model, prompt=PROMPT, max_tokens=24, temperature=0, extra_body=sent)
        assert found.choices[0].text == expected
    drawn = {client.completions.create(model=model, prompt=PROMPT, max_tokens=6, temperature=5, seed=seed, extra_body={
        "min_p": 1}).choices[0].text for seed in range(3)}
    assert drawn == {said(one, Question(PROMPT, 6))}


def test_answers_of_a_form(client: Any) -> None:
    """What OpenAI's client asks for and parses, from a file; a checkpoint says what to do."""
    from pydantic import BaseModel, Field

    class Place(BaseModel):
        kind: Literal["town", "river"]
        number: int = Field(ge=1, le=20)
        letters: list[Literal["a", "b"]] = Field(max_length=3)
        other: bool | None

    messages = [{"role": "user", "content": "Where was Ada born?"}]
    for seed in range(3):
        asked = {"model": "file", "messages": messages, "temperature": 1.5, "seed": seed, "max_tokens": 64}
        found = client.chat.completions.parse(**asked, response_format=Place)
        assert found.choices[0].finish_reason == "stop"
        assert isinstance(found.choices[0].message.parsed, Place)
        schema = {"type": "array", "items": {"type": "integer", "minimum": -20, "maximum": 99}, "minItems": 2, "maxItems": 4}
        for body in ({"guided_json": schema}, {"json_schema": schema}, {"grammar": 'root ::= "[1, 2" [0-9]{1,2} "]"'}):
            text = client.completions.create(model="file", prompt=PROMPT, max_tokens=40, temperature=1.5, seed=seed,
                                             extra_body=body).choices[0].text
            assert 2 <= len(json.loads(text)) <= 4
            assert all(-20 <= one <= 299 for one in json.loads(text))
        chunks = client.chat.completions.create(**asked, response_format={"type": "json_object"}, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks).startswith("{")
    with pytest.raises(openai.BadRequestError, match="export MODEL --gguf"):
        client.chat.completions.create(model="embedded", messages=messages, response_format={"type": "json_object"})
    for wrong in ("root ::= ", "x", '%llguidance {}\nstart: "a"'):
        with pytest.raises(openai.BadRequestError, match="grammar"):
            client.completions.create(model="file", prompt=PROMPT, max_tokens=4, extra_body={"grammar": wrong + '"'})


def test_a_model_without_a_template_does_not_converse(client: Any, models: Models) -> None:
    if "stories" not in models.by_name:
        pytest.skip("stories260k is not at hand: set TSOTSALLM_SHARED to a directory that holds it")
    with pytest.raises(openai.BadRequestError, match="/v1/completions"):
        client.chat.completions.create(model="stories", messages=[{"role": "user", "content": "Hello"}])
    found = client.completions.create(model="stories", prompt="Once upon a time", max_tokens=10, temperature=0)
    assert found.choices[0].text.startswith(", there was a little girl named Lily")


def test_models_are_listed(client: Any) -> None:
    assert [one.id for one in client.models.list()][:2] == ["file", "embedded"]
    assert client.models.retrieve("embedded").owned_by == "tsotsallm"


def ask(address: str, path: str, body: dict[str, Any] | None = None) -> Any:
    request = urllib.request.Request(address + path, None if body is None else json.dumps(body).encode(),
                                     {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request) as answer:
        content = answer.read()
    return json.loads(content) if content[:1] in (b"{", b"[") else content.decode()


def test_the_first_work_s_service(address: str, models: Models) -> None:
    """What HELM's client for it sends, and what it reads."""
    sent = {"prompt": PROMPT, "temperature": 1e-7, "num_return_sequences": 1, "max_new_tokens": 8, "top_p": 1,
            "echo_prompt": True, "top_k_per_token": 1, "stop_sequences": []}
    found = ask(address, "/process", sent)
    one = models.by_name["file"].speaker
    plain = said(one, Question(PROMPT, 8))
    assert found["text"] == PROMPT + plain
    assert isinstance(found["request_time"], float)
    assert "".join(token["text"] for token in found["tokens"]).endswith(PROMPT + plain)
    assert found["logprob"] == pytest.approx(sum(token["logprob"] for token in found["tokens"]))
    ids = ask(address, "/tokenize", {"text": PROMPT})["tokens"]
    assert ids == one.tokenize(PROMPT)
    import torch

    with torch.no_grad():
        shares = models.by_name["embedded"].speaker.model(torch.tensor([ids])).logits[0].log_softmax(-1)    # type: ignore[attr-defined]
    expected = [0.0, *(float(shares[place - 1, ids[place]]) for place in range(1, len(ids)))]
    assert [token["logprob"] for token in found["tokens"][:len(ids)]] == pytest.approx(expected, abs=2e-3)
    assert all(value >= token["logprob"] - 1e-6 for token in found["tokens"] for value in token["top_logprob"].values())
    without = ask(address, "/process", sent | {"echo_prompt": False})
    assert without["text"] == plain
    two = ask(address, "/process", {"prompt": PROMPT, "num_samples": 2, "max_new_tokens": 5, "temperature": 1.0, "seed": 3})
    assert len(two["samples"]) == 2
    assert two["text"] == two["samples"][0]["text"]
    assert ask(address, "/tokenize", {"text": PROMPT, "max_length": 3})["tokens"] == ids[:3]
    assert ask(address, "/tokenize", {"text": PROMPT, "max_length": 3, "truncation": False})["tokens"] == ids


def test_the_same_text_everywhere(address: str, file: Path, client: Any) -> None:
    """One slot, no prompt cache: library, command line, both APIs."""
    for how in ({"temperature": 0.0}, {"temperature": 0.9, "top_p": 0.9, "top_k": 30, "seed": 11}):
        library = "".join(tsotsallm.generate(file, PROMPT, tokens=16, **how))      # type: ignore[arg-type]
        options = [part for name, value in how.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        line = CliRunner().invoke(app, ["generate", str(file), PROMPT, "--tokens", "16", *options])
        assert line.stdout == PROMPT + library + "\n"
        more = {"extra_body": {"top_k": how["top_k"]}} if "top_k" in how else {}
        plain = {key: value for key, value in how.items() if key != "top_k"}
        for _ in range(2):
            found = client.completions.create(model="file", prompt=PROMPT, max_tokens=16, **plain, **more)
            assert found.choices[0].text == library
        first = ask(address, "/process", {"prompt": PROMPT, "max_new_tokens": 16, "top_k": 0, **how})
        assert first["text"] == library


def test_curl(address: str) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    body = json.dumps({"model": "file", "prompt": PROMPT, "max_tokens": 3, "temperature": 0, "stream": True})
    found = subprocess.run(["curl", "-sN", f"{address}/v1/completions", "-H", "Content-Type: application/json", "-H",
                            f"Authorization: Bearer {KEY}", "-d", body], capture_output=True, text=True, check=True)
    events = [line.removeprefix("data: ") for line in found.stdout.splitlines() if line]
    assert events[-1] == "[DONE]"
    assert len([json.loads(event) for event in events[:-1]]) == 4


@pytest.mark.parametrize("slots", [1, 3])
def test_memory_is_counted_with_one_conversation(file: Path, slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that models with different numbers of slots compare."""
    seen = iter((0, 10**9))
    monkeypatch.setattr(served, "rss_bytes", lambda: next(seen))
    one = load(str(file), "file", Loading(slots=slots))
    others = (slots - 1) * one.speaker.context * Checkpoint.open("embedded").spec.kv_bytes_per_token()
    assert one.memory_bytes == 10**9 - others


def test_memory_is_under_an_answer(address: str, models: Models) -> None:
    assert models.by_name["file"].memory_bytes
    answer = ask(address, "/v1/completions", {"model": "file", "prompt": PROMPT, "max_tokens": 2})
    assert answer["timings"]["ram_bytes"] == models.by_name["file"].memory_bytes


def test_health_and_metrics(address: str) -> None:
    assert ask(address, "/health") == {"status": "ok", "models": ask(address, "/health")["models"]}
    before = _series(ask(address, "/metrics"))
    ask(address, "/process", {"prompt": PROMPT, "max_new_tokens": 5, "temperature": 0})
    after = _series(ask(address, "/metrics"))
    new = 'tsotsallm_tokens_total{kind="new",model="file"}'
    assert after[new] - before.get(new, 0) == 5
    assert after["tsotsallm_resident_memory_bytes"] > 1e8
    assert after['tsotsallm_waiting{model="file"}'] == 0
    assert not any("etc/passwd" in name for name in after)


def _series(text: str) -> dict[str, float]:
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines()
            if line and not line.startswith("#")}


def test_names() -> None:
    assert name_of("/models/fitted/model.gguf") == "fitted"
    assert name_of("/models/a b.gguf") == "a-b"
    assert name_of("owner/Model-1B") == "Model-1B"
