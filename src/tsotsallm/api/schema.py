"""The JSON Schema of the files that people write: recipes, studies and tasks."""

from __future__ import annotations


def schema() -> dict[str, object]:
    """One JSON Schema for YAML files of recipes, studies and tasks, by which editors complete and check them.

    A list is a recipe, keys with `kind` among them are a task, other keys are a study.
    """
    from tsotsallm.evaluation.tasks import Task
    from tsotsallm.recipe import recipe_schema
    from tsotsallm.study.spec import open_schema, study_schema
    from tsotsallm.validation import schema_of

    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A recipe, a study or a task of tsotsallm",
            "$defs": {"recipe": recipe_schema(), "open": open_schema(), "study": study_schema(), "task": schema_of(Task)},
            "if": {"type": "array"}, "then": {"$ref": "#/$defs/recipe"},
            "else": {"if": {"type": "object", "required": ["kind"]}, "then": {"$ref": "#/$defs/task"},
                     "else": {"$ref": "#/$defs/study"}}}
