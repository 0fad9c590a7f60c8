"""tsotsallm recipes: the packaged recipes."""

from __future__ import annotations

from tsotsallm.cli.common import AsJson, answers, print_json


def recipes(as_json: AsJson = False) -> None:
    """List the packaged recipes."""
    with answers(as_json):
        from tsotsallm.recipe import packaged_recipes

        texts = {name: file.read_text("utf-8") for name, file in packaged_recipes().items()}
        if as_json:
            print_json(texts)
            return
        for name, text in texts.items():
            print(f"{name}\n" + "".join(f"    {line}\n" for line in text.splitlines()))
