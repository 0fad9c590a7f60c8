"""Small trained tokenizers of every kind that LLaMA-family checkpoints come with, and strings to tell them apart by."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SIZE = 640
TEMPLATE = ("{% if messages[0]['role'] == 'system' %}{{ bos_token + '<|system|>\n' + messages[0]['content'] + eos_token }}"
            "{% set messages = messages[1:] %}{% else %}{{ bos_token }}{% endif %}"
            "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}")
LLAMA2_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = '' %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% set content = system_message + message['content'] if loop.index0 == 0 else message['content'] %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}")
WORDS = ("the river runs through old town and children of village count boats Le fleuve est large les enfants comptent "
         "il était une fois 'em don't I'll we've hello world answer question was born in city name of town").split()
SCRIPTS = ("привет мир", "你好，世界", "こんにちは", "مرحبا", "नमस्ते", "ሰላም", "🙂🚀", "e\u0301a\u0300", "ﬁ", "Ａ１",
           "\u00a0x",
           "ß")


def training_text(seed: int = 0) -> Iterator[str]:
    """Lines with the words, digits, spaces and line breaks that the tokenizers learn merges of."""
    rng = random.Random(seed)
    for _ in range(1500):
        line = " ".join(rng.choices(WORDS, k=rng.randint(3, 12)))
        yield rng.choice(["", " ", "  ", "\n", "\n\n", "\t"]) + line + rng.choice([".", "!", "\n", " 42", " 3.14", "  "])


def strings(count: int, seed: int, specials: list[str]) -> list[str]:
    """Strings of words, spaces, line breaks, scripts, emoji and special tokens in every position."""
    rng = random.Random(seed)
    pieces = [*WORDS, *SCRIPTS, *specials, " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", ".", ",", "!?", "1", "12345",
              "3.14",
              "'s", "{}", "def f(x):\n    return x", "_", "-", "\u2028", "▁", "<", ">", "|"]
    return ["".join(rng.choice(pieces) + rng.choice(["", "", " "]) for _ in range(rng.randint(1, 12))) for _ in range(count)]


def conversations(count: int, seed: int, specials: list[str]) -> list[list[dict[str, str]]]:
    """Conversations of one to five turns, with and without system text, that end with the user."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        texts = strings(6, rng.randrange(1 << 30), specials if rng.random() < 0.2 else [])
        turns = 2 * rng.randint(0, 2) + 1
        messages = [{"role": "system", "content": texts[5]}] if rng.random() < 0.5 else []
        messages += [{"role": "assistant" if place % 2 else "user", "content": texts[place]} for place in range(turns)]
        found.append(messages)
    return found


def bpe(kind: str) -> Tokenizer:
    """A trained tokenizer: `bytes` (GPT-2's way), or SentencePiece's way with a scheme of leading spaces."""
    if kind in ("bytes", "llama3"):
        tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
        if kind == "llama3":
            from tokenizers import Regex

            pattern = ("(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| "
                       "?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|"
                       "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+")
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=SIZE - 8, special_tokens=["<s>", "</s>", "<unk>"], show_progress=False,
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        tokenizer.train_from_iterator(training_text(), trainer)
        return tokenizer
    letters = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    letters.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=SIZE - 8 - 256, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    letters.train_from_iterator(training_text(), trainer)
    content = json.loads(letters.to_str())
    learned = sorted(content["model"]["vocab"].items(), key=lambda item: item[1])
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)),
             *(token for token, place in learned if place > 2)]
    vocabulary = content["model"]["vocab"] = {token: place for place, token in enumerate(names)}
    content["model"]["merges"] = all_merges(vocabulary, names[259:])
    tokenizer = Tokenizer.from_str(json.dumps(content))
    if kind != "legacy":
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=kind, split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    return tokenizer


def all_merges(vocabulary: dict[str, int], tokens: list[str]) -> list[list[str]]:
    """Every pair of pieces that makes a token, as tokenizers have them that were converted from SentencePiece's files."""
    def pairs(token: str) -> list[list[str]]:
        found = [[token[:cut], token[cut:]] for cut in range(1, len(token))]
        return sorted((pair for pair in found if vocabulary.keys() >= set(pair)),
                      key=lambda pair: [vocabulary[one] for one in pair])

    return [pair for token in tokens for pair in pairs(token)]


def save(directory: Path, kind: str, *, bos: bool = True, eos: bool = False, template: str | None = TEMPLATE,
         added: tuple[AddedToken, ...] = (), config: dict[str, Any] | None = None) -> Path:
    """Write tokenizer files of a kind; `llama-new` and `llama-old` are transformers' own LlamaTokenizer, legacy or not."""
    from transformers import PreTrainedTokenizerFast

    base = {"llama-new": "legacy", "llama-old": "legacy"}.get(kind, kind)
    tokenizer = bpe(base)
    marks = [AddedToken(f"<|{role}|>", special=True, normalized=False) for role in ("system", "user", "assistant")]
    tokenizer.add_special_tokens([AddedToken("<unk>", special=True, normalized=False),
                                  AddedToken("<s>", special=True, normalized=False),
                                  AddedToken("</s>", special=True, normalized=False)])
    tokenizer.add_tokens([*marks, *added])
    sides = f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}"
    ids = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=sides, special_tokens=ids)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                                   clean_up_tokenization_spaces=False)
    fast.chat_template = template
    directory.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    written = json.loads(path.read_text("utf-8"))
    if kind.startswith("llama-"):
        written |= {"tokenizer_class": "LlamaTokenizer", "legacy": kind == "llama-old", "add_bos_token": bos,
                    "add_eos_token": eos}
    path.write_text(json.dumps(written | (config or {})), "utf-8")
    return directory
