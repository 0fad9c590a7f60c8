"""What devices, tasks and recipes print: everything that is packaged, the same as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.running import within
from tsotsallm.recipe import Recipe


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("verb", ["devices", "tasks", "recipes"])
def test_everything_that_is_packaged_is_listed(verb: str) -> None:
    shown, known = within(verb).stdout, json.loads(within(verb, "--json").stdout)
    assert len(known) > 2
    assert all(name in shown for name in known)
    if verb == "recipes":
        assert all(line.strip() in shown for text in known.values() for line in text.splitlines())
    else:
        assert all(facts["about"] in shown for facts in known.values())


def test_recipes_that_are_listed_are_recipes(tmp_path: Path) -> None:
    for name, text in json.loads(within("recipes", "--json").stdout).items():
        (tmp_path / "own.yaml").write_text(text, "utf-8")
        assert Recipe.parse(tmp_path / "own.yaml") == Recipe.parse(name)


def test_a_device_has_room_for_what_it_says() -> None:
    for name, facts in json.loads(within("devices", "--json").stdout).items():
        assert facts["weight_bytes"] > 0, name
        assert facts["source"]
