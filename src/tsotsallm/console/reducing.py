"""Plans, results and anatomies on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tsotsallm.console.lines import print_notes, table

if TYPE_CHECKING:
    from tsotsallm.inspection import Anatomy, FileAnatomy
    from tsotsallm.planning import Forecast
    from tsotsallm.run.run import Result


def print_plan(forecast: Forecast) -> None:
    from tsotsallm.units import human_bytes, human_seconds

    rows = []
    for number, sweep in enumerate(forecast.sweeps, 1):
        name = f"{number}. {' + '.join(sweep.stages) or 'copy'}" + (f", {sweep.engine}" if sweep.engine else "")
        rows.append([name, str(sweep.layers), human_bytes(sweep.ram_bytes), human_bytes(sweep.scratch_bytes),
                     f"{sweep.flops:.3g}", human_seconds(sweep.floor_s)])
    table("Plan", ["sweep", "layers", "RAM", "scratch", "operations", "floor of time"], rows)
    print(f"recipe      {forecast.recipe}")
    print(f"calibration {forecast.windows} windows of {forecast.window} tokens")
    print(f"parameters  {forecast.parameters:,} -> {forecast.result_parameters:,}")
    print(f"weights     {human_bytes(forecast.bytes)} -> {human_bytes(forecast.result_bytes)} at most")
    print(f"memory      {human_bytes(forecast.ram_bytes)} needed, {human_bytes(forecast.free_ram_bytes)} free")
    print(f"disk        {human_bytes(forecast.disk_bytes)} needed, {human_bytes(forecast.free_disk_bytes)} free")
    print(f"time        at least {human_seconds(forecast.floor_s)}, at {forecast.flops_per_second / 1e9:.0f} GFLOP/s "
          "(float32, measured now)")
    for warning in forecast.warnings:
        print(f"note        {warning}")


def print_result(result: Result) -> None:
    from tsotsallm.units import human_bytes, human_seconds

    table("Result", ["", "before", "after", "ratio"], [
        ["parameters", f"{result.parameters:,}", f"{result.result_parameters:,}",
         f"{result.result_parameters / result.parameters:.3f}"],
        ["weights on disk", human_bytes(result.bytes), human_bytes(result.result_bytes),
         f"{result.result_bytes / result.bytes:.3f}"]])
    for one in result.training:
        for place in one["samples"]:
            where = f"layer {place['layer']}" if "layer" in place else place["source"]
            losses = f"{place['held_out_loss_before']:.4f} -> {place['held_out_loss']:.4f}"
            print(f"{one['stage']:8}{where}: held-out loss {losses} in {place['steps']} steps, "
                  f"{human_seconds(place['elapsed_s'])} ({one['engine']}{'; ' * bool(place['stopped'])}{place['stopped']})")
    print(f"took {human_seconds(result.elapsed_s)} (floor {human_seconds(result.floor_s)}), "
          f"peak memory {human_bytes(result.peak_rss_bytes)}")
    for note in result.notes:
        print(f"note    {note}")
    for stage in result.stages:
        print(f"stage   {stage}")
    print(f"model   {result.path}")


def print_anatomy(name: str, found: Anatomy | FileAnatomy) -> None:
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
    print(f"stored as {found.storage}, {found.bits_per_linear_weight:.2f} bits per linear weight; KV cache {cache} a token "
          f"(16 bit); {found.macs_per_token / 1e6:.1f} million multiply-accumulates a token")
    if not isinstance(found, Anatomy):
        _print_file(found)
    print_notes(found.notes)


def _print_file(found: FileAnatomy) -> None:
    """What a GGUF file has that a checkpoint does not show: types, tokenizer, origin."""
    import json

    from tsotsallm.files import one_line
    from tsotsallm.units import human_bytes

    table("types", ["type", "parameters", "bytes", "share"], [
        [kind, f"{found.parameters_by_type[kind]:,}", human_bytes(size), f"{size / max(found.bytes, 1):.1%}"]
        for kind, size in found.bytes_by_type.items()])
    print(f"{human_bytes(found.file_bytes)} in the file, of GGUF version {found.version}; {found.bits_per_weight:.2f} bits "
          "per weight")
    cut = found.tokenizer
    if cut is None:
        print("no tokenizer")
    else:
        kind = f"{cut['kind']} ({cut['model']}{', ' * bool(cut['pre'])}{cut['pre'] or ''})"
        added = " and ".join(name.upper() for name in ("bos", "eos") if cut[f"adds_{name}"]) or "neither"
        print(f"tokenizer: {one_line(kind)}, {cut['tokens']:,} tokens, {cut['merges']:,} merges")
        print(f"BOS {_token(cut['bos'])}, EOS {_token(cut['eos'])}; {added} put around text; "
              f"{'a' if cut['chat_template'] else 'no'} chat template")
    for key, value in found.made_from.items():
        print(f"{key}: {one_line(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))}")


def _token(one: dict[str, Any] | None) -> str:
    from tsotsallm.files import quoted

    return "none" if one is None else f"{one['number']} ({quoted(one['text'])})"
