"""SmolLM2-135M-Instruct from the package index: every verb on its GGUF file, and 4 bits against ggml's own quantiser.

    python benchmarks/real_model.py --work DIR --text FILE --calibration FILE_OR_DIR [--windows 16] [--window 512]
                                    [--limit 40] [--part verbs,copies,quality] [--model FILE.gguf]

verbs    seconds and peak memory of each command, in processes of their own
copies   two layers dropped and the vocabulary halved: every other block must be the source's, and llama.cpp runs the file
quality  KL and perplexity of q4_0: rounded, by ggml with the importance matrix of the same text, and calibrated here

The weights of the file lie on Q4_1's grid (embeddings on Q8_0's), so that q4_1 costs nothing there and every comparison at
four bits is a little off: `gguf_quality.py` shows the same on the embedded model, whose weights lie on no grid.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import tsotsallm
from tsotsallm.calibration import Calibration
from tsotsallm.checkpoint.gguf_file import GgufFile
from tsotsallm.checkpoint.reader import Checkpoint

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import measured
from benchmarks.gguf_quality import by_ggml, fitting, importance_matrix
from tests.real_model import real_model

DROPPED = (10, 20)
HALF = 24_576


def command(*words: str | Path, stdin: str = "") -> str:
    """Run a verb in a process of its own and print its seconds and peak memory; raises where it fails."""
    names = " ".join(word.name if isinstance(word, Path) else word for word in words)
    try:
        found = measured.run([sys.executable, "-m", "tsotsallm", *words], stdin=stdin)
    except measured.CommandError as error:
        raise SystemExit(f"{' '.join(map(str, words))} failed: {error}") from None
    print(f"| `{names}` | {found.seconds:.1f} s | {found.peak_rss_bytes / 1e6:.0f} MB |", flush=True)
    return found.output


def emptied(path: Path) -> Path:
    """A path at which nothing is left from an earlier run."""
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)
    return path


def verbs(file: Path, asked: argparse.Namespace) -> None:
    """From the file to an answer of the smaller model."""
    print("| command | time | peak memory |\n|---|---|---|")
    small, written = emptied(asked.work / "small"), emptied(asked.work / "small.gguf")
    command("inspect", file)
    command("evaluate", file, "--stream", "--text", asked.text, "--limit", "4")
    command("compress", file, "gptq:q4_0", "-o", small, "--calibration", asked.calibration, "--windows", str(asked.windows),
            "--window", str(asked.window))
    command("export", small, "--gguf", written)
    answer = command("chat", written, stdin="What is the capital of France?\n")
    print(f"\n{answer.strip()}\n\n{file.stat().st_size:,} bytes before, {written.stat().st_size:,} after")


def copies(file: Path, asked: argparse.Namespace) -> None:
    """Two layers and half of the vocabulary go; raises where another block changed, or llama.cpp does not run the file."""
    print("| command | time | peak memory |\n|---|---|---|")
    fewer, written = emptied(asked.work / "fewer"), emptied(asked.work / "fewer.gguf")
    recipe = f"[{{vocabulary: {{keep: ['{asked.text}'], size: {HALF}}}}}, 'skip:{'+'.join(map(str, DROPPED))}']"
    command("compress", file, recipe, "-o", fewer)
    command("export", fewer, "--gguf", written)
    command("generate", written, "The capital of France is", "--tokens", "8")
    before, after = (_blocks(path) for path in (file, written))
    kept = [layer for layer in range(30) if layer not in DROPPED]
    same = 0
    for name, data in after.items():
        parts = name.split(".")
        if parts[0] == "blk":
            parts[1] = str(kept[int(parts[1])])
        if name != "token_embd.weight":
            if data != before[".".join(parts)]:
                raise SystemExit(f"{name} is not what the source has")
            same += 1
    embeddings = GgufFile.open(written).tensors["token_embd.weight"]
    row = embeddings.size // embeddings.shape[0]
    cut = dict.fromkeys(_rows(before["token_embd.weight"], row))
    rows = _rows(after["token_embd.weight"], row)
    if not all(one in cut for one in rows):
        raise SystemExit("a row of the embeddings is none of the source's")
    print(f"\n{same} tensors and {len(rows):,} rows of the embeddings are the source's byte for byte; "
          f"{file.stat().st_size:,} bytes before, {written.stat().st_size:,} after")


def _blocks(path: Path) -> dict[str, bytes]:
    content = path.read_bytes()
    return {name: content[one.start:one.start + one.size] for name, one in GgufFile.open(path).tensors.items()}


def _rows(data: bytes, row: int) -> list[bytes]:
    return [data[first:first + row] for first in range(0, len(data), row)]


def quality(file: Path, asked: argparse.Namespace) -> None:
    """KL and perplexity of the linears on q4_0, embeddings as they are."""
    checkpoint = Checkpoint.open(file)
    settings = Calibration(str(asked.calibration), asked.windows, asked.window)
    print("| q4_0 | perplexity | KL | same top token |\n|---|---|---|---|")

    def row(name: str, model: Path) -> None:
        found = tsotsallm.evaluate(model, asked.text, reference=file, limit=asked.limit)
        if name == "rounded":
            print(f"| original | {found.reference_perplexity:.2f} | 0 | |")
        print(f"| {name} | {found.perplexity:.2f} | {found.kl:.4f} ± {found.kl_standard_error:.4f} | "
              f"{found.same_top_token:.1%} |", flush=True)

    for name, recipe in (("rounded", "rtn:q4_0"), ("calibrated here", "gptq:q4_0")):
        out = emptied(asked.work / "ours")
        tsotsallm.compress(file, recipe, out, calibration=str(asked.calibration), windows=asked.windows, window=asked.window)
        row(name, out)
    matrix = importance_matrix(checkpoint, settings, asked.work)
    row("ggml, importance matrix", by_ggml(checkpoint, fitting(checkpoint, "q4_0"), matrix, asked.work / "theirs"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--part", default="verbs,copies,quality")
    parser.add_argument("--model", type=Path)
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    parts = {"verbs": verbs, "copies": copies, "quality": quality}
    file = asked.model or real_model()
    for name in asked.part.split(","):
        parts[name](file, asked)


if __name__ == "__main__":
    main()
