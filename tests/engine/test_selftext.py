"""Text that a model writes itself: what it is made of, that it is kept, and where it is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tests.conftest import build, build_talking, byte_tokenizer
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.engine import selftext
from tsotsallm.engine.generation import Drawn, nucleus
from tsotsallm.engine.resident import resident
from tsotsallm.engine.selftext import SelfText, prompts, text_start
from tsotsallm.errors import CorpusError

WINDOWS, WINDOW = 4, 48


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("plain") / "model", "llama2", num_hidden_layers=2)


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_talking(tmp_path_factory.mktemp("talking") / "model")


def written_by(path: Path, windows: int = WINDOWS, window: int = WINDOW, seed: int = 0) -> SelfText:
    return SelfText(Checkpoint.open(path), windows, window, seed)


def never(*_args: Any, **_options: Any) -> Any:
    pytest.fail("the model was loaded")


# -- drawing ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.95, 0.999])
def test_the_nucleus_is_the_smallest_set_with_its_share(temperature: float, top_p: float,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tsotsallm.engine.generation.LIKELIEST", 5)
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(1)) * 3
    shares, tokens = nucleus(logits, temperature, top_p)
    for row in range(len(logits)):
        weights = [float(torch.exp(value / temperature)) for value in logits[row].double()]
        naive, reached = {}, 0.0
        for token in sorted(range(40), key=lambda token: -weights[token]):
            if reached < top_p:
                naive[token] = weights[token] / sum(weights)
            reached += weights[token] / sum(weights)
        found = {int(token): float(share) for token, share in zip(tokens[row], shares[row], strict=True) if share > 0}
        assert found.keys() == naive.keys()
        assert all(abs(found[token] - naive[token]) < 1e-5 for token in naive)


def test_tokens_are_drawn_by_their_shares_and_by_the_seed() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, -50.0]]).expand(4000, -1)
    drawn = Drawn(7, 1.0, 1.0)(logits, 5)
    counts = Counter(drawn.tolist())
    for token, share in enumerate(logits[0].softmax(-1).tolist()):
        assert abs(counts[token] / 4000 - share) < 0.03
    assert torch.equal(Drawn(7, 1.0, 1.0)(logits, 5), drawn)
    assert not torch.equal(Drawn(8, 1.0, 1.0)(logits, 5), drawn)
    assert set(Drawn(7, 1.0, 1.0, ends=[0])(logits, 0).tolist()) == {1, 2}
    assert set(Drawn(7, 0.0, 0.5)(logits, 3).tolist()) == {0}


# -- what is written --------------------------------------------------------------------------------------------------

def test_without_temperature_it_is_what_transformers_writes(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftext, "TEXT", 0.0)
    written = written_by(plain)
    codec = written.checkpoint.codec
    start = torch.tensor([codec.prefix])
    new = resident(written.checkpoint).generate(start, attention_mask=torch.ones_like(start), max_new_tokens=written.length,
                                                do_sample=False, pad_token_id=0, min_new_tokens=1)[0].tolist()
    ends = [place for place, token in enumerate(new) if token in codec.ends]
    expected = selftext.cleaned(codec.decode(new[:ends[0]] if ends else new, special=False))
    assert set(written.text().split("\n\n")) - {""} == set(expected.split("\n\n"))


def test_answers_to_requests_are_written_without_temperature_as_transformers_does(talking: Path,
                                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftext, "ANSWERS", 0.0)
    written = written_by(talking)
    codec, text = written.checkpoint.codec, written.text()
    asked = [prompt for prompt in prompts() if f"<user>{prompt}\n<assistant>" in text]
    ids = torch.tensor([codec.conversation([{"role": "user", "content": asked[0]}])])
    new = resident(written.checkpoint).generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8,
                                                do_sample=False, pad_token_id=0)[0, ids.shape[1]:].tolist()
    beginning = codec.continuation([token for token in new if token not in codec.ends]).strip().rstrip("\ufffd")
    assert f"<user>{asked[0]}\n<assistant>{beginning}" in text
    assert 3 < len(asked) < len(prompts())
    assert any(not ord(letter) < 128 for letter in "".join(asked))


def test_a_model_that_does_not_converse_writes_text_alone(plain: Path) -> None:
    written = written_by(plain)
    codec, text = written.checkpoint.codec, written.text()
    assert len(codec.encode(text, prefix=False)) >= 1.25 * WINDOWS * WINDOW
    assert not any(prompt in text for prompt in prompts())
    assert text_start(codec) == codec.prefix == (0,)


def test_the_text_is_the_same_for_the_same_seed_only(talking: Path, monkeypatch: pytest.MonkeyPatch,
                                                     tmp_path: Path) -> None:
    first, other = written_by(talking).text(), written_by(talking, seed=1).text()
    monkeypatch.setenv("TSOTSALLM_CACHE", str(tmp_path))
    assert written_by(talking).text() == first != other


@pytest.mark.parametrize(("bos", "eos", "expected"), [("Ā", "ā", True), (None, "ā", True), (None, None, False)])
def test_texts_begin_as_the_tokenizer_has_it(plain: Path, tmp_path: Path, bos: str | None, eos: str | None,
                                             expected: bool) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in plain.iterdir():
        if not file.name.startswith(("tokenizer", "special")):
            (model / file.name).symlink_to(file)
    plain_tokenizer = byte_tokenizer(bos=False)
    PreTrainedTokenizerFast(tokenizer_object=plain_tokenizer.backend_tokenizer, bos_token=bos,
                            eos_token=eos).save_pretrained(model)
    written = written_by(model)
    codec = written.checkpoint.codec
    assert codec.prefix == ()
    given = codec.bos if codec.bos is not None else codec.eos
    assert text_start(codec) == ((given,) if expected else ())
    starts = {tuple(ids) for ids in written._parts()[0].prompts(0, 8)}
    assert (len(starts) == 1) is expected
    assert len(codec.encode(written.text(), prefix=False)) >= WINDOWS * WINDOW


def test_a_text_begins_after_the_end_of_text_where_bos_is_not_put_before_it(plain: Path, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(bos=False)
    alphabet = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["model"]["vocab"]["<|endoftext|>"] = backend["model"]["vocab"].pop(alphabet[9])
    model = tmp_path / "model"
    model.mkdir()
    for file in plain.iterdir():
        if not file.name.startswith(("tokenizer", "special")):
            (model / file.name).symlink_to(file)
    (model / "tokenizer.json").write_text(json.dumps(backend))
    PreTrainedTokenizerFast(tokenizer_file=str(model / "tokenizer.json"), bos_token=alphabet[0], eos_token=alphabet[1],
                            additional_special_tokens=["<|endoftext|>"]).save_pretrained(model)
    assert text_start(Checkpoint.open(model).codec) == (9,)


def test_requests_are_many_and_short() -> None:
    written, compared = prompts(), prompts("compare")
    assert len(written) == len(set(written)) >= 60
    assert len(compared) == len(set(compared)) >= 40
    assert all(0 < len(prompt) < 160 for prompt in written + compared)
    assert not set(written) & set(compared)           # no model is compared on what it was calibrated on


# -- what is kept -----------------------------------------------------------------------------------------------------

def test_it_is_written_once(talking: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = written_by(talking)
    assert not first.kept
    shares: list[float] = []
    text = first.text(lambda _step, share: shares.append(share))
    assert all(0 <= share <= 1 for share in shares)
    assert shares[-1] == 1
    assert [path.name for path in first.path.parent.iterdir()] == [first.path.name]
    monkeypatch.setattr(selftext, "resident", never)
    again = written_by(talking)
    assert again.kept
    assert again.text() == text
    assert again.text_file().read_text("utf-8") == text
    assert {written_by(talking, seed=1).path, written_by(talking, windows=5).path, written_by(talking, window=64).path,
            first.path} == {first.path} | {written_by(talking, *asked).path for asked in ((4, 48, 1), (5, 48), (4, 64))}
    assert len({written_by(talking, *asked).path for asked in ((4, 48), (4, 48, 1), (5, 48), (4, 64))}) == 4


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"{\"documents\": [], \"sha256\": \"\"}", b"\xff\xfe"])
def test_a_damaged_text_is_written_again(plain: Path, damage: bytes) -> None:
    written = written_by(plain)
    text = written.text()
    written.path.write_bytes(damage)
    assert not written.kept
    assert written_by(plain).text() == text
    assert written.kept


def test_a_changed_text_is_written_again(plain: Path) -> None:
    written = written_by(plain)
    text = written.text()
    content = json.loads(written.path.read_text("utf-8"))
    content["documents"][0] += "more"
    written.path.write_text(json.dumps(content), "utf-8")
    assert written_by(plain).text() == text


def test_what_a_stopped_run_wrote_is_taken_over(talking: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = written_by(talking).text()
    monkeypatch.setenv("TSOTSALLM_CACHE", str(tmp_path))
    made: list[str] = []
    batch = SelfText._batch

    def stopping(self: SelfText, part: Any, *args: Any) -> list[str]:
        if part.name == "answers" and len(made) < 2:
            raise KeyboardInterrupt
        made.append(part.name)
        return batch(self, part, *args)

    monkeypatch.setattr(SelfText, "_batch", stopping)
    with pytest.raises(KeyboardInterrupt):
        written_by(talking).text()
    before = made.count("text")
    assert before > 0
    made += ["", ""]
    assert written_by(talking).text() == text
    assert made.count("text") == before


# -- where it is refused ----------------------------------------------------------------------------------------------

def test_a_model_that_does_not_fit_in_memory_is_refused(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftext, "free_ram_bytes", lambda: 1000)
    monkeypatch.setattr(selftext, "resident", never)
    with pytest.raises(CorpusError, match=r"in memory, which takes .*, and 1 kB are free; close other programs, or give a "
                                          r"text of your own with calibration=FILE or DIR"):
        written_by(plain).text()


def test_a_packed_model_stays_packed_where_memory_is_short(plain: Path, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    import tsotsallm

    tsotsallm.compress(plain, "rtn:q4_0", tmp_path / "packed")
    written = written_by(tmp_path / "packed")
    small, large = written.ram_bytes(packed=True), written.ram_bytes(packed=False)
    assert small < large
    text = written.text()
    written.path.unlink()
    loaded: list[bool] = []

    def loading(checkpoint: Checkpoint, *, keep_packed: bool) -> Any:
        loaded.append(keep_packed)
        return resident(checkpoint, keep_packed=keep_packed)

    monkeypatch.setattr(selftext, "resident", loading)
    monkeypatch.setattr(selftext, "free_ram_bytes", lambda: (small + large) // 2)
    assert written_by(tmp_path / "packed").text() == text
    assert loaded == [True]


def test_a_model_that_says_nothing_is_refused(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftext, "cleaned", lambda _text: "")
    monkeypatch.setattr(selftext, "TRIES", 0)
    with pytest.raises(CorpusError, match=r"the model wrote 0 tokens in \d+ documents, fewer than the 240 that are needed; "
                                          r"give a text of your own"):
        written_by(plain).text()
