"""The comparison with other tools: types of llama.cpp's files, measured processes, and the table of records."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import measured
from benchmarks.ggml_files import Shape, type_in, type_of_embeddings, types_of
from benchmarks.peer_tables import write_tables


def test_types_of_a_file_follow_llama_cpp_and_give_way_where_blocks_do_not_fit() -> None:
    shape = Shape(layers=32, grouped=True)
    assert [type_in("Q4_K_M", shape, layer, "down_proj") for layer in (0, 4, 6, 31)] == ["q6_k", "q4_k", "q6_k", "q6_k"]
    assert type_in("IQ2_S", shape, 5, "v_proj") == "q4_k"
    assert type_of_embeddings("IQ2_S", 4096) == "q5_k"
    tensors = {"blk.0.attn_q.weight": (576, 576), "blk.0.ffn_down.weight": (576, 1536), "token_embd.weight": (100, 576)}
    assert list(types_of(tensors, "q4_k", shape).values()) == ["q5_0", "q4_k", None]
    assert list(types_of(tensors, "IQ3_S", shape).values()) == ["iq4_nl", "iq3_s", "q8_0"]


def test_a_measured_process_counts_what_it_starts() -> None:
    child = "import time; held = bytearray(200_000_000); time.sleep(1)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}]); print('done')"
    found = measured.run([sys.executable, "-c", parent])
    assert found.output.strip() == "done"
    assert found.peak_rss_bytes > 200_000_000


def test_a_process_that_fails_gives_its_last_line_and_one_that_takes_too_long_is_ended() -> None:
    with pytest.raises(measured.CommandError, match=r"^no such thing$"):
        measured.run([sys.executable, "-c", "import sys; sys.exit('first\\nno such thing\\n')"])
    with pytest.raises(measured.CommandError, match="stopped after"):
        measured.run([sys.executable, "-c", "import time; time.sleep(60)"], timeout_s=0.5)


def record(method: str, size: int, kl: float, **more: Any) -> dict[str, Any]:
    score = {"kl": kl, "kl_error": kl / 10, "perplexity": 12.0, "reference_perplexity": 11.0}
    difference = {"low": -0.05, "high": 0.01}
    return {"method": method, "series": method.partition("-")[0], "whole": False, "model": "smol",
            "made_with": {"windows": 16, "window": 512, "threads": 2}, "scored_with": {"limit": 60},
            "examined_with": {"items": 300},
            "made": {"bytes": size, "bits_per_linear_weight": 4.5, "minutes": 3.0, "peak_rss_bytes": 10**9},
            "scored": {"texts": {"WikiText-2": score}},
            "examined": {"tasks": {"piqa": {"score": 0.6, "reference": 0.62, "difference": difference}}},
            "timed": {"engine": "llama.cpp", "decode_tokens_per_s": 40.0}, **more}


def test_the_table_has_a_row_for_each_method_and_the_reason_of_what_was_skipped(tmp_path: Path) -> None:
    failed = record("c-1", 1, 1.0)
    skipped = {key: failed[key] for key in failed if key not in ("made", "scored", "examined", "timed")}
    later = {key: value for key, value in record("b-1", 80_000_000, 0.2).items() if key != "examined"}
    write_tables([later, record("a-1", 80_000_000, 0.1), record("a-2", 60_000_000, 0.3),
                  skipped | {"skipped": "cannot be installed: no matching distribution"}], tmp_path)
    text = (tmp_path / "peers.md").read_text("utf-8")
    assert "| original |  |  | 0 | 11.000 | 62.0% |" in text
    assert "| a-1 | 80.00 | 4.50 | 0.100 ± 0.010 | 12.000 | 60.0% (-5.0 to +1.0) | 3.0 | 1.00 GB | 40.0 (llama.cpp) |" in (
        text)
    assert "| b-1 | 80.00 | 4.50 | 0.200 ± 0.020 | 12.000 |  | 3.0 | 1.00 GB | 40.0 (llama.cpp) |" in text
    assert "- c-1 was skipped: cannot be installed: no matching distribution" in text
    pytest.importorskip("matplotlib")
    assert (tmp_path / "peers.png").stat().st_size > 10_000


def test_results_under_other_settings_are_in_a_table_of_their_own(tmp_path: Path) -> None:
    other = record("b-1", 80_000_000, 0.2, scored_with={"limit": 4})
    write_tables([record("a-1", 80_000_000, 0.1), json.loads(json.dumps(other))], tmp_path)
    tables = (tmp_path / "peers.md").read_text("utf-8").split("smol: ")[1:]
    assert ["b-1" in one for one in tables] == [False, True]
