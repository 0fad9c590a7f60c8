"""The model card (README.md) of a result, with the hub's metadata."""

from __future__ import annotations

import yaml

from tsotsallm.checkpoint.provenance import Provenance
from tsotsallm.units import human_bytes


def model_card(provenance: Provenance, *, own_container: bool, packed: bool) -> str:
    """The card's Markdown: what the model is, how it was made, its size in bytes, and how to run it.

    own_container  whether only this package reads its weights
    packed         whether some of them are codes on a grid
    """
    source, measures, stages = provenance.source, provenance.measures, list(provenance.recipe)
    head: dict[str, object] = {"library_name": "tsotsallm" if own_container else "transformers",
                            "tags": ["tsotsallm", "compressed"]}
    if source.count("/") == 1:
        head["base_model"] = source
    if own_container:
        usage = ("The weights are stored in TSOTSALLM's own container (for grids of GGUF, NF4, 8-bit corrections, repeated "
                 "layers stored once); plain transformers does not read it.\n\n"
                 "```python\nimport tsotsallm\nmodel, tokenizer = tsotsallm.load(\"PATH\")\n```\n\n"
                 "For llama.cpp and Ollama: `tsotsallm export PATH --gguf OUT.gguf`.")
    else:
        packages = "transformers compressed-tensors" if packed else "transformers"
        usage = (f"```\npip install {packages}\n```\n```python\nfrom transformers import AutoModelForCausalLM, "
                 "AutoTokenizer\nmodel = AutoModelForCausalLM.from_pretrained(\"PATH\")\n"
                 "tokenizer = AutoTokenizer.from_pretrained(\"PATH\")\n```")
    recipe = yaml.safe_dump(stages, sort_keys=False, default_flow_style=None) if stages else "[]\n"
    calibration = provenance.calibration
    text = (f"calibrated on {calibration.windows} windows ({calibration.tokens} tokens) of "
            f"`{calibration.source}`" if calibration else "without calibration text")
    before = "" if measures.source_types is None else (
        f" The source was quantised before ({measures.source_types}): what that lost is part of this model, and losses that "
        "are measured against it do not count it.")
    return (f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# {source}, made smaller\n\n"
            f"Made by TSOTSALLM from `{source}`, {text}. Weights: {human_bytes(measures.bytes)}, "
            f"from {human_bytes(measures.source_bytes)}.{before}\n\n"
            f"The recipe:\n\n```yaml\n{recipe}```\n\n## How to run it\n\n{usage}\n\n"
            "`tsotsallm.json` holds the recipe, the hashes of all inputs and the versions. What was lost can be measured "
            "with `tsotsallm evaluate PATH --text FILE --reference ORIGINAL`.\n")
