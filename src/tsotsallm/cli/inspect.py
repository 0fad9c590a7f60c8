"""tsotsallm inspect: what a model consists of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tsotsallm.cli.common import AsJson, answers, print_json
from tsotsallm.files import JsonObject

if TYPE_CHECKING:
    from tsotsallm.analysis.tokens import TokenCosts
    from tsotsallm.inspection import Anatomy, FileAnatomy


def inspect(model: Annotated[str, typer.Argument(help="Model to read: a checkpoint directory, a hub id (NAME/MODEL), a GGUF "
                                                      "file, a model of Ollama (ollama:NAME), or 'embedded' for the small "
                                                      "model that is included.")],
            text: Annotated[list[str] | None, typer.Option(help="Text file or folder of texts whose cost in tokens to show; "
                                                                "repeat the option to compare several.")] = None,
            as_json: AsJson = False) -> None:
    """Show what a checkpoint or a GGUF file consists of.

    Widths, parameters, bytes by part, cache and work per token; what texts cost in tokens.
    """
    with answers(as_json):
        from tsotsallm.api.inspect import inspect, token_costs

        anatomy = inspect(model)
        costs = token_costs(model, text) if text else None
        if as_json:
            print_json(anatomy.plain() | ({"token_costs": costs.plain()} if costs is not None else {}))
            return
        print_anatomy(str(model), anatomy)
        if costs is not None:
            print_token_costs(costs)


def print_token_costs(costs: TokenCosts) -> None:
    """Print one row per text, then what a vocabulary cut to all of them would save."""
    from tsotsallm.cli.lines import table
    from tsotsallm.units import human_bytes

    table("texts", ["text", "words", "tokens", "tokens per word", "bytes per token"], [
        [one.source, f"{one.words:,}", f"{one.tokens:,}", f"{one.tokens_per_word:.2f}", f"{one.bytes_per_token:.2f}"]
        for one in costs.texts])
    if costs.needed is None or costs.saved is None:
        print(f"this vocabulary cannot be cut: {costs.note}")
        return
    print(f"these texts need {costs.needed:,} of {costs.vocabulary:,} tokens; the stage `vocabulary` would save "
          f"{human_bytes(costs.saved)}")


def print_anatomy(name: str, found: Anatomy | FileAnatomy) -> None:
    """Print one row per part, then widths, storage and costs; of a GGUF file also its tokenizer and origin."""
    from tsotsallm.cli.lines import print_notes, table
    from tsotsallm.inspection import Anatomy
    from tsotsallm.units import human_bytes

    rows = [[part, f"{found.parameters_by_part[part]:,}", human_bytes(size), f"{size / max(found.bytes, 1):.1%}"]
            for part, size in found.bytes_by_part.items()]
    rows.append(["all", f"{found.parameters:,}", human_bytes(found.bytes), "100%"])
    table(name, ["part", "parameters", "bytes", "share"], rows)
    stored = f" ({found.stored_layers} stored)" if isinstance(found, Anatomy) and found.stored_layers != found.layers else ""
    cache = "unknown" if found.kv_cache_bytes_per_token is None else human_bytes(found.kv_cache_bytes_per_token)
    layers, hidden, width, heads, head_dim, kv_heads, vocabulary, context = (
        "unknown" if value is None else value for value in (
            found.layers, found.hidden, found.feed_forward, found.heads, found.head_dim, found.kv_heads, found.vocabulary,
            found.context))
    print(f"{found.family or 'unknown'}: {layers} layers{stored}, hidden {hidden}, feed-forward {width}, {heads} heads of "
          f"{head_dim}, {kv_heads} KV heads, vocabulary {vocabulary}, context {context}, "
          f"{'tied' if found.tied_embeddings else 'untied'} embeddings")
    print(f"stored as {found.storage}, {found.bits_per_linear_weight:.2f} bits per linear weight; KV cache {cache} per "
          f"token (16 bit); {found.macs_per_token / 1e6:.1f} million multiply-accumulates per token")
    if not isinstance(found, Anatomy):
        _print_file(found)
    print_notes(found.notes)


def _print_file(found: FileAnatomy) -> None:
    """Print what a GGUF file has that a checkpoint does not show: types, tokenizer, origin."""
    import json

    from tsotsallm.cli.lines import table
    from tsotsallm.files import one_line
    from tsotsallm.units import human_bytes

    table("types", ["type", "parameters", "bytes", "share"], [
        [kind, f"{found.parameters_by_type[kind]:,}", human_bytes(size), f"{size / max(found.bytes, 1):.1%}"]
        for kind, size in found.bytes_by_type.items()])
    print(f"{human_bytes(found.file_bytes)} in the file, of GGUF version {found.version}; {found.bits_per_weight:.2f} bits "
          "per weight")
    tokenizer = found.tokenizer
    if tokenizer is None:
        print("no tokenizer")
    else:
        kind = f"{tokenizer['kind']} ({tokenizer['model']}{', ' * bool(tokenizer['pre'])}{tokenizer['pre'] or ''})"
        added = " and ".join(name.upper() for name in ("bos", "eos") if tokenizer[f"adds_{name}"]) or "neither"
        print(f"tokenizer: {one_line(kind)}, {tokenizer['tokens']:,} tokens, {tokenizer['merges']:,} merges")
        print(f"BOS {_token(tokenizer['bos'])}, EOS {_token(tokenizer['eos'])}; {added} put around text; "
              f"{'a' if tokenizer['chat_template'] else 'no'} chat template")
    for key, value in found.made_from.items():
        print(f"{key}: {one_line(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))}")


def _token(token: JsonObject | None) -> str:
    from tsotsallm.files import quoted

    return "none" if token is None else f"{token['number']} ({quoted(token['text'])})"
