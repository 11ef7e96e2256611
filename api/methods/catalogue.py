"""The matrix of methods and objectives, from their registries: as JSON and as a page.

``python -m api.methods.catalogue`` writes the table into ``docs/methods.md``.
"""

import re
from pathlib import Path
from typing import Any

from models.domain.base import JsonObject
from worker.training import methods, objectives
from worker.training.methods.base import Method, Served
from worker.training.objectives.base import Objective

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
_TABLE = re.compile(r"(?<=<!-- methods -->\n).*?(?=<!-- end -->)", re.DOTALL)
_PRECISIONS = ("nf4", "int8", "bf16", "fp32")
_WAYS = {
    Served.BATCHED: "in one batch with all others",
    Served.MERGED: "merged, as a model of its own",
    Served.OWN: "unmerged, as a model of its own",
}


def catalogue() -> JsonObject:
    """Return all methods and objectives, each by name."""
    return {
        "object": "list",
        "data": [_method(each) for each in methods.all_methods().values()],
        "objectives": [_objective(each) for each in objectives.all_objectives().values()],
    }


def _method(method: Method) -> JsonObject:
    params: Any = method.Params()
    return {
        "object": "method",
        "id": method.name,
        "title": method.title,
        "when": method.when,
        "schema": method.Params.model_json_schema(),
        "defaults": params.model_dump(),
        "precisions": [each for each in _PRECISIONS if each in method.precisions],
        "families": sorted(method.families),
        "objectives": [
            each.name
            for each in objectives.all_objectives().values()
            if each.family in method.families
        ],
        "served": method.served(params).value,
        "learning_rate_scale": method.rate_scale,
        "can_be_gone_on_from": method.goes_on,
    }


def _objective(objective: Objective) -> JsonObject:
    return {
        "object": "objective",
        "id": objective.name,
        "schema": objective.Params.model_json_schema(),
        "forms": sorted(objective.forms),
        "family": objective.family,
        "learning_rate_scale": objective.rate_scale,
    }


def table() -> str:
    """Return the table of methods in Markdown."""
    lines = [
        "| `peft.type` | method | when | base held in | answers | learning rate |",
        "|---|---|---|---|---|---|",
    ]
    for method in methods.all_methods().values():
        held = ", ".join(f"`{each}`" for each in _PRECISIONS if each in method.precisions)
        way = _WAYS[method.served(method.Params())]
        rate = f"× {method.rate_scale:g}"
        cells = (f"`{method.name}`", method.title, method.when, held, way, rate)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def with_table(page: str) -> str:
    """Return `page` with the table of today between its two marks."""
    return _TABLE.sub(lambda _: table(), page)


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
