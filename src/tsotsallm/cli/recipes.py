"""tsotsallm recipes: the packaged recipes, and the JSON Schema of files like them."""

from __future__ import annotations

from typing import Annotated

import typer

from tsotsallm.cli.common import AsJson, answers, print_json


def recipes(as_json: AsJson = False, schema: Annotated[bool, typer.Option(
        "--schema", help="Print the JSON Schema of recipes, studies and tasks instead, by which editors complete and check "
        "such YAML files.")] = False) -> None:
    """List the packaged recipes."""
    with answers(as_json):
        from tsotsallm.api.schema import schema as whole_schema
        from tsotsallm.recipe import packaged_recipes

        texts = {name: file.read_text("utf-8") for name, file in packaged_recipes().items()}
        if schema or as_json:
            print_json(whole_schema() if schema else texts)
            return
        for name, text in texts.items():
            print(f"{name}\n" + "".join(f"    {line}\n" for line in text.splitlines()))
