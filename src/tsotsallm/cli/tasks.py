"""tsotsallm tasks: the packaged evaluation tasks."""

from __future__ import annotations

from dataclasses import asdict

from tsotsallm.cli.common import AsJson, answers, print_json


def tasks(as_json: AsJson = False) -> None:
    """List the packaged evaluation tasks."""
    with answers(as_json):
        from tsotsallm.cli.lines import table
        from tsotsallm.evaluation.tasks import packaged_tasks, read_task

        known = [read_task(name) for name in packaged_tasks()]
        if as_json:
            print_json({task.name: task.plain() | {"about": task.about, "hub": asdict(task.hub) if task.hub else None}
                        for task in known})
            return
        table("Tasks", ["task", "kind", "about"], [[task.name, task.kind, task.about] for task in known])
