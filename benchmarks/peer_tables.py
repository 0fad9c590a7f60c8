"""The table and the picture of benchmarks/peers.py, from its records."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tsotsallm.units import plus_minus

Record = dict[str, Any]


def write_tables(records: Sequence[Record], folder: Path) -> None:
    """Write FOLDER/peers.md and FOLDER/peers.png; results taken with different settings are in tables of their own."""
    by_settings: dict[str, list[Record]] = {}
    for record in records:
        key = json.dumps([record["model"], record["made_with"], record["scored_with"], record["examined_with"]])
        by_settings.setdefault(key, []).append(record)
    parts = [f"{title(group[0])}\n\n{table(group)}" for group in by_settings.values()]
    (folder / "peers.md").write_text("\n\n".join(parts) + "\n", "utf-8")
    scored = [group for group in by_settings.values() if any("scored" in record for record in group)]
    if scored:
        draw(max(scored, key=len), folder / "peers.png")


def title(record: Record) -> str:
    """What all results of a table have in common."""
    made, scored = record["made_with"], record["scored_with"] | record["examined_with"]
    return (f"{record['model']}: calibrated on {made['windows']} windows of {made['window']} tokens, {made['threads']} "
            f"threads; compared on at most {scored['limit']} windows of 512 tokens of each text and {scored['items']} "
            "items of each task.")


def table(records: Sequence[Record]) -> str:
    """One row per method, the original first; what was skipped comes last, with the reason."""
    scored = [record for record in records if "scored" in record]
    texts = list(scored[0]["scored"]["texts"]) if scored else []
    examined = next((record["examined"]["tasks"] for record in scored if "examined" in record), {})
    tasks = list(examined)
    measures = [f"{text}: {what}" for text in texts for what in ("KL", "perplexity")]
    head = ["method", "MB", "bits per linear weight", *measures, *tasks, "minutes", "peak memory", "tokens/s"]
    rows = [head, ["---"] * len(head)]
    if scored:
        first = scored[0]["scored"]
        rows.append(["original", "", "", *(cell for text in texts for cell in (
            "0", f"{first['texts'][text]['reference_perplexity']:.3f}")),
            *(f"{found['reference']:.1%}" for found in examined.values()), "", "", ""])
    rows += [row(record, texts, tasks) for record in scored]
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    skipped = [f"- {record['method']} was skipped: {record['skipped']}" for record in records if "skipped" in record]
    return "\n".join(lines) + ("\n\n" + "\n".join(skipped) if skipped else "")


def row(record: Record, texts: Sequence[str], tasks: Sequence[str]) -> list[str]:
    """The cells of a method; after an accuracy, the paired 95% interval of its difference from the original in points."""
    made, scored, timed = record["made"], record["scored"], record.get("timed", {})
    bits, speed = made["bits_per_linear_weight"], timed.get("decode_tokens_per_s")
    cells = [record["method"] + (" (whole)" if record["whole"] else ""), f"{made['bytes'] / 1e6:.2f}",
             f"{bits:.2f}"]
    for text in texts:
        found = scored["texts"][text]
        cells += [plus_minus(found["kl"], found["kl_error"]), f"{found['perplexity']:.3f}"]
    for task in tasks:
        if "examined" not in record:
            cells.append("")
            continue
        found = record["examined"]["tasks"][task]
        low, high = (100 * found["difference"][end] for end in ("low", "high"))
        cells.append(f"{found['score']:.1%} ({low:+.1f} to {high:+.1f})")
    return [*cells, f"{made['minutes']:.1f}", f"{made['peak_rss_bytes'] / 1e9:.2f} GB",
            "" if speed is None else f"{speed:.1f} ({timed['engine']})"]


def _short(method: str) -> str:
    """A method's name without the tool's, which the colour says."""
    for tool in ("ours-", "ggml-", "llm-compressor-", "gptqmodel-", "auto-round-"):
        if method.startswith(tool):
            return method.removeprefix(tool)
    return method


def draw(records: Sequence[Record], out: Path) -> None:
    """KL divergence, on a logarithmic scale, over the bytes of the file; a panel for each text.

    A line joins those methods of a tool that no smaller file of it beats.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    scored = [record for record in records if "scored" in record]
    texts = list(scored[0]["scored"]["texts"])
    figure, axes = pyplot.subplots(1, len(texts), figsize=(7 * len(texts), 5.5), squeeze=False, layout="constrained")
    series = list(dict.fromkeys(record["series"] for record in scored))
    colours = {name: f"C{number}" for number, name in enumerate(series)}
    for axis, text in zip(axes[0], texts, strict=True):
        for number, name in enumerate(series):
            points = sorted((record["made"]["bytes"] / 1e6, record["scored"]["texts"][text]["kl"],
                             record["scored"]["texts"][text]["kl_error"], record["method"])
                            for record in scored if record["series"] == name)
            size, kl, error, methods = zip(*points, strict=True)
            ours = name.startswith("TSOTSALLM")
            axis.errorbar(size, kl, error, label=name, color=colours[name], marker="o^sDvP*X"[number % 8], markersize=6,
                          linestyle="none", capsize=2)
            front = [place for place, value in enumerate(kl) if value == min(kl[:place + 1])]
            axis.plot([size[place] for place in front], [kl[place] for place in front], color=colours[name], linewidth=1.2,
                      linestyle="-" if ours else "--")
            for place, method in enumerate(methods):
                axis.annotate(_short(method), (size[place], kl[place]), textcoords="offset points", fontsize=7,
                              xytext=(-6, -9) if ours else (6, 4), ha="right" if ours else "left", color=colours[name])
        axis.set(yscale="log", xlabel="MB of the file with weights", title=text,
                 ylabel="KL from the original, nats per token")
        axis.grid(True, which="both", alpha=0.3)
    axes[0][0].legend(fontsize="small")
    figure.savefig(out, dpi=130)
    pyplot.close(figure)
