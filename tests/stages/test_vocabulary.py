"""A cut vocabulary: the same segmentation, the original's probabilities renormalised, any text still encodable."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

import tsotsallm
from tests.conftest import build, shared
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.errors import CheckpointError, RecipeError
from tsotsallm.lab.texts import world_text


@pytest.fixture(scope="module")
def kept_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keep") / "keep.txt"
    path.write_text(world_text(test=False, characters=30_000))
    return path


@pytest.fixture(scope="module")
def smaller(kept_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("smaller") / "out"
    tsotsallm.compress("embedded", [{"vocabulary": {"keep": [str(kept_text)]}}], out)
    return out


def random_strings(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    spans = ((32, 126), (0xA0, 0x24F), (0x370, 0x3FF), (0x4E00, 0x4FFF), (0x1F300, 0x1F6FF), (9, 13), (0x600, 0x6FF))

    def one() -> str:
        return "".join(chr(rng.randint(*rng.choice(spans))) for _ in range(rng.randint(1, 40)))
    return [one() for _ in range(count)]


def test_kept_text_is_cut_alike_and_ten_thousand_strings_round_trip(smaller: Path, kept_text: Path) -> None:
    ours, theirs = Checkpoint.open(smaller), Checkpoint.open("embedded")
    kept = ours.tokens_of_original
    assert kept is not None
    assert ours.spec.vocabulary == len(kept) < theirs.spec.vocabulary
    small, large = ours.tokenizer(), theirs.tokenizer()
    text = kept_text.read_text()
    assert [kept[token] for token in small(text)["input_ids"]] == large(text)["input_ids"]
    assert [kept[token] for token in (small.bos_token_id, small.eos_token_id)] == [large.bos_token_id, large.eos_token_id]
    for string in random_strings(10_000):
        assert small.decode(small(string)["input_ids"], skip_special_tokens=True) == string


def test_perplexity_is_the_originals_renormalised(smaller: Path, kept_text: Path) -> None:
    """Against Hugging Face logits of the whole model with the other tokens taken out."""
    kept = torch.tensor(Checkpoint.open(smaller).tokens_of_original)
    model, tokenizer = tsotsallm.load("embedded")
    ids = torch.tensor([tokenizer(kept_text.read_text())["input_ids"][:200]])
    with torch.no_grad():
        expected = torch.log_softmax(model(ids).logits[0][:, kept], -1)
        new = torch.searchsorted(kept, ids)
        found = torch.log_softmax(tsotsallm.load(smaller)[0](new).logits[0], -1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    compared = tsotsallm.evaluate(smaller, kept_text, reference="embedded", limit=3)
    assert compared.kl == pytest.approx(0, abs=1e-6)
    assert compared.perplexity == pytest.approx(compared.reference_perplexity)


def test_other_text_is_refused_token_by_token(smaller: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    small, large = Checkpoint.open(smaller), Checkpoint.open("embedded")
    dropped = sorted(set(range(large.spec.vocabulary)) - set(small.tokens_of_original or []))
    other.write_text(large.tokenizer().decode(dropped[:200]))
    with pytest.raises(CheckpointError, match="splits the text into other tokens"):
        tsotsallm.evaluate(smaller, other, reference="embedded")


def test_a_size_keeps_what_is_needed_most_and_fills_up(kept_text: Path, tmp_path: Path) -> None:
    sizes = {}
    for size in (700, 3000):
        recipe = [{"vocabulary": {"keep": [str(kept_text)], "size": size}}]
        forecast = tsotsallm.plan("embedded", recipe)
        result = tsotsallm.compress("embedded", recipe, tmp_path / str(size))
        assert result.result_bytes <= forecast.result_bytes < forecast.bytes
        sizes[size] = Checkpoint.open(tmp_path / str(size))
        assert sizes[size].spec.vocabulary == size
    assert set(sizes[700].tokens_of_original or []) < set(sizes[3000].tokens_of_original or [])
    content = json.loads((tmp_path / "700" / "tokenizer.json").read_text())
    merges = [tuple(pair) for pair in content["model"]["merges"]]
    assert all({left, right, left + right} <= content["model"]["vocab"].keys() for left, right in merges)


def test_sentencepiece_falls_back_to_bytes(stories: Path, tmp_path: Path) -> None:
    keep = tmp_path / "keep.txt"
    keep.write_text("Once upon a time, there was a little girl named Lily. She loved to play outside in the park.\n")
    tsotsallm.compress(stories, [{"vocabulary": {"keep": [str(keep)]}}], tmp_path / "out")
    small, large = Checkpoint.open(tmp_path / "out"), Checkpoint.open(stories)
    kept = small.tokens_of_original
    assert kept is not None
    assert not (tmp_path / "out" / "tokenizer.model").exists()
    text = "Once upon a time, there was a little girl"
    assert [kept[token] for token in small.tokenizer()(text)["input_ids"]] == large.tokenizer()(text)["input_ids"]
    for string in ("Zoë's 漢字 🙂", "xyz"):
        ids = small.tokenizer()(string)["input_ids"]
        assert small.tokenizer().decode(ids, skip_special_tokens=True) == string


def test_bad_vocabularies(kept_text: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="put it first"):
        tsotsallm.plan("embedded", [{"depth": {"remove": 1}}, {"vocabulary": {"keep": [str(kept_text)]}}])
    with pytest.raises(RecipeError, match=r"lacks keep"):
        tsotsallm.plan("embedded", [{"vocabulary": {}}])
    with pytest.raises(CheckpointError, match="more than"):
        tsotsallm.plan("embedded", [{"vocabulary": {"keep": [str(kept_text)], "size": 10}}])
    with pytest.raises(Exception, match=r"nowhere\.txt"):
        tsotsallm.plan("embedded", [{"vocabulary": {"keep": ["nowhere.txt"]}}])
    wrong = build(tmp_path / "wrong", "llama3", vocab_size=100)
    with pytest.raises(CheckpointError, match="do not belong together"):
        tsotsallm.plan(wrong, [{"vocabulary": {"keep": [str(kept_text)]}}])


def test_swahili_and_hausa_keep_their_tokens(tmp_path: Path) -> None:
    """Real text in other languages: cut alike, after the model learned nothing of them."""
    folder = shared("data", "multilingual")
    path = next(iter(sorted(folder.glob("*.txt"))))
    text = path.read_text("utf-8")[:4000]
    (tmp_path / "keep.txt").write_text(text)
    tsotsallm.compress("embedded", [{"vocabulary": {"keep": [str(tmp_path / "keep.txt")]}}], tmp_path / "out")
    small, large = Checkpoint.open(tmp_path / "out"), Checkpoint.open("embedded")
    kept = small.tokens_of_original or []
    assert [kept[token] for token in small.tokenizer()(text)["input_ids"]] == large.tokenizer()(text)["input_ids"]


@pytest.fixture(scope="module")
def llama3_like(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As in Llama 3's tokenizer.json: special tokens stand among the added only, and a token comes from several merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(text.read_text().splitlines(), trainer)
    content = json.loads(tokenizer.to_str())
    known = content["model"]["vocab"]
    content["model"]["merges"] += [[token[:cut], token[cut:]] for token in known for cut in range(1, len(token))
                                   if token[:cut] in known and token[cut:] in known
                                   and [token[:cut], token[cut:]] not in content["model"]["merges"]]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    size = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(["<|begin|>", "<|end|>", "<|turn|>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", size)])
    path = build(tmp_path_factory.mktemp("llama3_like") / "model", "llama3", vocab_size=size + 3, bos_token_id=size,
                 eos_token_id=size + 1)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>").save_pretrained(path)
    return path


def test_special_tokens_that_stand_among_the_added_only_are_kept(llama3_like: Path, tmp_path: Path) -> None:
    keep = tmp_path / "keep.txt"
    keep.write_text("the rain in Spain stays mainly in the plain")
    tsotsallm.compress(llama3_like, [{"vocabulary": {"keep": [str(keep)]}}], tmp_path / "out")
    ours, theirs = Checkpoint.open(tmp_path / "out"), Checkpoint.open(llama3_like)
    kept = ours.tokens_of_original
    assert kept is not None
    assert len(kept) < theirs.spec.vocabulary
    small, large = ours.tokenizer(), theirs.tokenizer()
    assert [kept[small(token)["input_ids"][-1]] for token in ("<|begin|>", "<|end|>", "<|turn|>")] == [
        large(token)["input_ids"][-1] for token in ("<|begin|>", "<|end|>", "<|turn|>")]
    assert [kept[token] for token in small(keep.read_text())["input_ids"]] == large(keep.read_text())["input_ids"]
    assert kept[ours.spec.config["eos_token_id"]] == theirs.spec.config["eos_token_id"]
