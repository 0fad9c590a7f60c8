"""What text becomes for a model: tokens of every file, what is put around texts, ends of answers, conversations."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

import tsotsallm
from tests.conftest import build
from tests.fidelity import kinds
from tsotsallm.checkpoint import codec
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.engine.interface import Question, said
from tsotsallm.engine.llama import Llama
from tsotsallm.engine.transformer import Transformer
from tsotsallm.errors import CheckpointError, ConversationError, CorpusError, ExportError
from tsotsallm.stages.vocabulary import Vocabulary
from tsotsallm.training.samples import instruction_windows

USER = [{"role": "user", "content": "the river"}]
NEW = {"content": "<|tool|>", "special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return build(tmp_path / "model", "llama2", vocab_size=kinds.SIZE, bos_token_id=None, eos_token_id=None)


def write(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None takes one away."""
    content = json.loads(path.read_text("utf-8")) if path.exists() else {}
    path.write_text(json.dumps({key: value for key, value in (content | changes).items() if value is not None}), "utf-8")


def add_token(directory: Path, where: str) -> int:
    """Name a token in one of the files that transformers reads it from; its number."""
    number = len(Checkpoint.open(directory).tokenizer())
    if where == "added_tokens.json":
        (directory / where).write_text(json.dumps({"<|tool|>": number}))
        return number
    listed = json.loads((directory / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    known = {str(one["id"]): {key: value for key, value in one.items() if key != "id"} for one in listed}
    write(directory / "tokenizer_config.json", added_tokens_decoder=known | {str(number): NEW})
    return number


@pytest.mark.parametrize("kind", ["bytes", "never"])
@pytest.mark.parametrize("where", ["tokenizer_config.json", "added_tokens.json"])
def test_tokens_beside_tokenizer_json_are_tokens_everywhere(model: Path, tmp_path: Path, kind: str, where: str) -> None:
    kinds.save(model, kind)
    number = add_token(model, where)
    checkpoint = Checkpoint.open(model)
    assert checkpoint.codec.encode("a<|tool|>b")[2] == number
    tsotsallm.to_gguf(model, tmp_path / "model.gguf")
    engine = Llama(tmp_path / "model.gguf", threads=1)
    assert engine.tokens[number] == "<|tool|>"
    assert engine.raw_tokens("a<|tool|>b") == checkpoint.codec.encode("a<|tool|>b")
    smaller = Vocabulary(keep=["x"]).applied(checkpoint, ["the river"])
    assert number in (smaller.kept_tokens or [])
    assert smaller.codec.decode(smaller.codec.encode("a<|tool|>b")[-2:-1]) == "<|tool|>"


def test_a_cut_model_with_tokens_of_every_file_loads_again(model: Path, tmp_path: Path) -> None:
    kinds.save(model, "llama-new")
    add_token(model, "added_tokens.json")
    text = tmp_path / "keep.txt"
    text.write_text("the river runs through the old town\n\n\nand children count boats\n")
    tsotsallm.compress(model, [{"vocabulary": {"keep": [str(text)]}}], tmp_path / "small")
    before, after = Checkpoint.open(model), Checkpoint.open(tmp_path / "small")
    assert after.tokens_of_original is not None
    for probe in (text.read_text(), "a<|tool|>b", "<|user|>the river</s>"):
        ids = after.codec.encode(probe)
        assert before.codec.decode([after.tokens_of_original[one] for one in ids]) == before.codec.decode(
            before.codec.encode(probe))


def test_empty_lines_of_kept_texts_stay_one_token(model: Path) -> None:
    kinds.save(model, "llama3")
    checkpoint = Checkpoint.open(model)
    text = "the river\n\nruns\n\n\nthrough\r\n\r\nold town"
    smaller = Vocabulary(keep=["x"]).applied(checkpoint, [text])
    assert smaller.kept_tokens is not None
    assert [smaller.kept_tokens[one] for one in smaller.codec.encode(text)] == checkpoint.codec.encode(text)


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_greedy_added_tokens_are_refused_or_accepted(model: Path, tmp_path: Path, flag: str) -> None:
    kinds.save(model, "bytes", added=(AddedToken("<|x|>", special=False, normalized=False, **{flag: True}),))
    with pytest.raises(ExportError, match=rf"<\|x\|>.*{flag}.*accept_differences"):
        tsotsallm.to_gguf(model, tmp_path / "model.gguf")
    assert not list(tmp_path.glob("model.gguf*"))
    found = tsotsallm.to_gguf(model, tmp_path / "model.gguf", accept_differences=True)
    assert found["verified"]["different"] > 0


@pytest.mark.parametrize(("config", "generation"), [
    (1, [1, 3, 4]), ([1, 3, 4], 1), ([1, 3], [4]), ([1, 3, 4], None), (None, [1, 3, 4])])
def test_every_token_that_ends_an_answer_ends_it_in_both_engines(model: Path, tmp_path: Path, config: Any,
                                                                 generation: Any) -> None:
    kinds.save(model, "bytes")
    write(model / "config.json", eos_token_id=config)
    (model / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (model / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    codec = Checkpoint.open(model).codec
    assert {1, 3, 4} <= set(codec.ends)
    assert codec.ends[0] == codec.eos == 1
    tsotsallm.to_gguf(model, tmp_path / "model.gguf")
    engine = Llama(tmp_path / "model.gguf", threads=1)
    assert [token for token in range(60) if engine.ends_at(token)] == sorted(set(codec.ends))


def test_more_ends_than_gguf_has_keys_for_are_refused(model: Path, tmp_path: Path) -> None:
    kinds.save(model, "bytes")
    write(model / "config.json", eos_token_id=list(range(10, 17)))
    with pytest.raises(ExportError, match="8 tokens end an answer"):
        tsotsallm.to_gguf(model, tmp_path / "model.gguf")
    write(model / "config.json", eos_token_id=list(range(10, 15)))
    tsotsallm.to_gguf(model, tmp_path / "model.gguf")


def test_a_model_that_names_no_end_ends_at_bos(model: Path, tmp_path: Path) -> None:
    kinds.save(model, "bytes")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    for token in tokenizer["added_tokens"]:
        token["content"] = token["content"].replace("</s>", "<none>")
    tokenizer["model"]["vocab"]["<none>"] = tokenizer["model"]["vocab"].pop("</s>")
    del tokenizer["post_processor"]["special_tokens"]["</s>"]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    write(model / "tokenizer_config.json", eos_token=None)
    (model / "chat_template.jinja").unlink()
    codec = Checkpoint.open(model).codec
    assert codec.eos is None
    assert codec.ends == (codec.bos,)
    tsotsallm.to_gguf(model, tmp_path / "model.gguf")


@pytest.mark.parametrize("kind", ["bytes", "legacy"])
def test_an_appended_eos_is_taken_off_prompts(model: Path, tmp_path: Path, kind: str) -> None:
    kinds.save(model, kind, eos=True)
    codec = Checkpoint.open(model).codec
    assert codec.tokenizer("a")["input_ids"][-1] == codec.eos
    assert codec.suffix == (codec.eos,)
    assert codec.encode("the river")[-1] != codec.eos
    assert any("</s>" in note for note in codec.notes)
    found = tsotsallm.to_gguf(model, tmp_path / "model.gguf")
    assert any("</s>" in note for note in found["notes"])
    assert Llama(tmp_path / "model.gguf", threads=1).raw_tokens("the river") == codec.encode("the river")
    plain = kinds.save(build(tmp_path / "plain", "llama2", vocab_size=kinds.SIZE), kind)
    write(plain / "config.json", bos_token_id=None, eos_token_id=None)
    ask = Question("the river runs", 8)
    assert said(Transformer(Checkpoint.open(model)), ask) == said(Transformer(Checkpoint.open(plain)), ask)
    task = tmp_path / "task.yaml"
    task.write_text('kind: answers\nlayouts: [{prompt: "{{q}}", answers: a}]\n')
    items = tmp_path / "items.jsonl"
    items.write_text("".join(json.dumps({"q": f"the river {word}", "a": "x"}) + "\n" for word in kinds.WORDS[:5]))
    both = tsotsallm.examine([plain, model], [task], data=items)
    first, second = both.comparisons[0].scores
    assert first.value == second.value
    assert any("</s>" in note for results in both.results for result in results for note in result.notes)


def test_a_token_past_the_embeddings_is_named_by_every_verb(model: Path, tmp_path: Path) -> None:
    kinds.save(model, "bytes", added=(AddedToken("<|far|>", special=True, normalized=False),))
    number = Checkpoint.open(model).codec.encode("<|far|>")[-1]
    small = kinds.save(build(tmp_path / "small", "llama2", vocab_size=number), "bytes",
                       added=(AddedToken("<|far|>", special=True, normalized=False),))
    checkpoint = Checkpoint.open(small)
    speaker = Transformer(checkpoint)
    for prompt in ("a <|far|>", ({"role": "user", "content": "<|far|>"},)):
        with pytest.raises(CheckpointError, match=rf"numbers '<\|far\|>' {number}, but the model has {number}"):
            said(speaker, Question(prompt, 3))
    text = tmp_path / "text.txt"
    text.write_text("the river <|far|> runs\n" * 50)
    with pytest.raises(CheckpointError, match="do not belong together"):
        tsotsallm.evaluate(small, text, context=32)
    found = tsotsallm.to_gguf(small, tmp_path / "model.gguf")
    assert any("no row in the embeddings" in note for note in found["notes"])


def test_a_prefix_that_is_not_bos_is_kept(model: Path, tmp_path: Path) -> None:
    kinds.save(model, "bytes", template=None)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    user = next(one["id"] for one in tokenizer["added_tokens"] if one["content"] == "<|user|>")
    tokenizer["post_processor"]["single"].insert(1, {"SpecialToken": {"id": "<|user|>", "type_id": 0}})
    tokenizer["post_processor"]["special_tokens"]["<|user|>"] = {"id": "<|user|>", "ids": [user], "tokens": ["<|user|>"]}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    codec = Checkpoint.open(model).codec
    assert codec.prefix == (codec.bos, user)
    with pytest.raises(ExportError, match="plain text, before which"):
        tsotsallm.to_gguf(model, tmp_path / "model.gguf")
    tsotsallm.to_gguf(model, tmp_path / "model.gguf", accept_differences=True)
    assert Llama(tmp_path / "model.gguf", threads=1).tokenize("the river") == codec.encode("the river")


# -- conversations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [kinds.TEMPLATE, kinds.LLAMA2_TEMPLATE,
                                      "{{ messages | tojson(indent=2) }}{{ eos_token }}",
                                      "{%- for m in messages -%}\n  "
                                      "{%- generation %}{{ m.content | trim }}{% endgeneration -%}\n"
                                      "{% if loop.last %}{% break %}{% endif %}{%- endfor %}"])
def test_conversations_are_rendered_as_transformers_renders_them(model: Path, template: str) -> None:
    kinds.save(model, "bytes", template=template)
    codec = Checkpoint.open(model).codec
    for messages in kinds.conversations(30, 3, ["</s>"]):
        assert codec.render(messages) == codec.tokenizer.apply_chat_template(messages, tokenize=False,
                                                                             add_generation_prompt=True)
        assert codec.conversation(messages, answer=False) == codec.tokenizer.apply_chat_template(messages, return_dict=False)
        if "content" not in template:           # transformers continues no message of such a template
            continue
        more = [*messages, {"role": "assistant", "content": "the  old"}]
        assert codec.render(more) == codec.tokenizer.apply_chat_template(more, tokenize=False, continue_final_message=True)


def test_the_embedded_model_converses_alike_on_both_engines(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open("embedded")
    tsotsallm.to_gguf("embedded", tmp_path / "model.gguf", dense="f32")
    engine, speaker = Llama(tmp_path / "model.gguf", kv="f32", threads=1), Transformer(checkpoint)
    for words in ("Where was Ada born?", "Hello!", "Who is a baker?", "Où est né Ada ?"):
        talk = ({"role": "user", "content": words},)
        ids = checkpoint.codec.conversation(talk)
        assert ids[0] == checkpoint.codec.bos
        assert ids.count(ids[0]) == 1
        assert engine.raw_conversation(talk) == ids
        assert said(engine, Question(talk, 24)) == said(speaker, Question(talk, 24))


def test_a_template_without_bos_wins_over_plain_text(model: Path, tmp_path: Path) -> None:
    kinds.save(model, "bytes", template=kinds.TEMPLATE.replace("bos_token + ", "").replace("{{ bos_token }}", ""))
    codec = Checkpoint.open(model).codec
    with pytest.raises(ExportError, match="before which '<s>' belongs"):
        tsotsallm.to_gguf(model, tmp_path / "model.gguf")
    tsotsallm.to_gguf(model, tmp_path / "model.gguf", accept_differences=True)
    engine = Llama(tmp_path / "model.gguf", threads=1)
    assert engine.raw_conversation(USER) == codec.conversation(USER)
    assert engine.tokenize("the river") == codec.encode("the river")
    assert engine.tokenize("the river")[0] == codec.bos


@pytest.mark.parametrize("templates", [
    [{"name": "rag", "template": "{{ messages }}"}, {"name": "tool_use", "template": "{{ messages }}"}]])
def test_templates_without_a_default_do_not_converse(model: Path, tmp_path: Path, templates: Any) -> None:
    kinds.save(model, "bytes", template=None)
    write(model / "tokenizer_config.json", chat_template=templates)
    checkpoint = Checkpoint.open(model)
    with pytest.raises(ConversationError, match="rag, tool_use and none of them is named `default`"):
        checkpoint.codec.render(USER)
    assert not Transformer(checkpoint).converses
    found = tsotsallm.to_gguf(model, tmp_path / "model.gguf")
    assert any("rag, tool_use" in note for note in found["notes"])


def test_the_default_of_several_templates_converses(model: Path, tmp_path: Path) -> None:
    kinds.save(model, "bytes", template=None)
    write(model / "tokenizer_config.json", chat_template=[{"name": "default", "template": kinds.TEMPLATE},
                                                          {"name": "rag", "template": "{{ messages }}"}])
    codec = Checkpoint.open(model).codec
    assert codec.render(USER) == "<s><|user|>\nthe river</s><|assistant|>\n"
    tsotsallm.to_gguf(model, tmp_path / "model.gguf")
    assert Llama(tmp_path / "model.gguf", threads=1).raw_conversation(USER) == codec.conversation(USER)


def test_additional_templates_go_along(model: Path, text: Path, tmp_path: Path) -> None:
    kinds.save(model, "bytes")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    assert set(Checkpoint.open(model).codec.templates) == {"default", "rag"}
    tsotsallm.compress(model, "rtn:8:32", tmp_path / "small")
    assert set(Checkpoint.open(tmp_path / "small").codec.templates) == {"default", "rag"}
    tsotsallm.to_huggingface(tmp_path / "small", tmp_path / "dense")
    assert set(Checkpoint.open(tmp_path / "dense").codec.templates) == {"default", "rag"}


def test_a_template_that_refuses_a_role_is_one_error_everywhere(model: Path, tmp_path: Path) -> None:
    kinds.save(model, "bytes", template=kinds.LLAMA2_TEMPLATE)
    checkpoint = Checkpoint.open(model)
    tsotsallm.to_gguf(model, tmp_path / "model.gguf")
    talk = ({"role": "assistant", "content": "a"}, {"role": "user", "content": "b"})
    for speaker in (Transformer(checkpoint), Llama(tmp_path / "model.gguf", threads=1)):
        with pytest.raises(ConversationError, match="must alternate"):
            said(speaker, Question(talk, 3))
    with pytest.raises(CorpusError, match=r"chat, line 7: .*must alternate"):
        instruction_windows([(7, list(talk))], checkpoint.codec, 256, "chat")


def test_a_conversation_that_ends_with_the_assistant_is_continued_by_both_engines(model: Path, tmp_path: Path) -> None:
    kinds.save(model, "bytes")
    checkpoint = Checkpoint.open(model)
    tsotsallm.to_gguf(model, tmp_path / "model.gguf", dense="f32")
    engine, speaker = Llama(tmp_path / "model.gguf", kv="f32", threads=1), Transformer(checkpoint)
    talk = (*USER, {"role": "assistant", "content": "the old"})
    assert checkpoint.codec.render(talk) == "<s><|user|>\nthe river</s><|assistant|>\nthe old"
    question = Question(talk, 6)
    assert engine._ids(question) == checkpoint.codec.conversation(talk)
    assert said(engine, question).replace("�", "") == said(speaker, question).replace("�", "")


def test_a_normalizer_that_blows_text_up_is_refused(model: Path) -> None:
    kinds.save(model, "bytes")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [step] * 40}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match="lengthens text"):
        _ = Checkpoint.open(model).codec


def test_a_panic_of_the_tokenizers_library_is_an_error_in_words(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    kinds.save(model, "bytes")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = [["q", "no such token"]]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match="no usable tokenizer"):
        _ = Checkpoint.open(model).codec
    assert capfd.readouterr().err == ""


def test_a_special_token_that_is_none_is_an_error_in_words(model: Path) -> None:
    """transformers asks for the unknown token's number by the unknown token."""
    kinds.save(model, "bytes", config={"unk_token": ""})
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["unk_token"] = None
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match=r"no usable tokenizer \(RecursionError"):
        _ = Checkpoint.open(model).codec


@pytest.mark.parametrize("kind", ["bytes", "embedded"])
def test_a_long_text_in_pieces_gives_the_tokens_and_ends_of_the_whole(model: Path, kind: str,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle is the tokenizer on the whole text; spaces, breaks and scripts of every kind stand beside the cuts."""
    monkeypatch.setattr(codec, "PIECE_CHARACTERS", 300)
    found = Checkpoint.open("embedded" if kind == "embedded" else model).codec
    chance = random.Random(5)
    parts = ["word", "Word", " a", "  b", "\n", " \n ", "\n\n", "'s", "it's", " 12", "3.5", "é", "e\u0301", "ሰላም", "你好",
             "🙂", "<s>", "."]
    text = "".join(chance.choice(parts) + chance.choice(["", " ", " and more "]) for _ in range(3000))
    whole = found.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, ends = found.encode_with_ends(text)
    assert ends is not None
    assert (list(ids), list(ends)) == (whole["input_ids"], [end for _, end in whole["offset_mapping"]])
    assert len(list(found._pieces(text))) > 10
