"""Forms follow the schemas of the registries, whatever plug-in comes."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from api.ui import plugin_forms
from models.domain.base import Parameters
from models.domain.training import Precision
from worker.training import methods, objectives


class Inner(Parameters):
    patience: int = 3


class NewParams(Parameters):
    """A method that nobody has written yet.

    More about it.
    """

    type: Literal["new"] = "new"
    rank: Annotated[int, Field(ge=1, le=64, description="How many.")] = 8
    rate: Literal["auto"] | Annotated[float, Field(gt=0)] = "auto"
    mode: Literal["fast", "exact"] = "fast"
    is_tied: bool = False
    names: list[str] | Literal["all"] = "all"
    limit: int | None = None
    inner: Inner = Inner()
    weights: dict[str, float] = Field(default_factory=dict)


class NewMethod:
    name = "new"
    Params: type[BaseModel] = NewParams


def test_each_kind_of_field_has_its_place() -> None:
    form = plugin_forms.of_plugin(NewMethod())
    assert form["name"] == "new"
    assert form["summary"] == "A method that nobody has written yet."
    assert form["types"] == ["new"]
    fields = {field["name"]: field for field in form["fields"]}
    assert {name: field["kind"] for name, field in fields.items()} == {
        "rank": "integer",
        "rate": "text",
        "mode": "choice",
        "is_tied": "boolean",
        "names": "list",
        "limit": "integer",
        "inner": "object",
        "weights": "object",
    }
    rank = fields["rank"]
    assert (rank["default"], rank["least"], rank["most"], rank["help"]) == (8, 1, 64, "How many.")
    assert fields["mode"]["choices"] == ["fast", "exact"]
    assert (fields["rate"]["default"], fields["names"]["default"]) == ("auto", "all")


def test_every_method_and_objective_there_is_has_a_form() -> None:
    for plugin in (*methods.all_methods().values(), *objectives.all_objectives().values()):
        form = plugin_forms.of_plugin(plugin)
        known = set(plugin.Params.model_fields) - {"type"}
        assert {field["name"] for field in form["fields"]} == known
        assert form["summary"]


def test_the_precisions_are_those_that_a_job_takes() -> None:
    form = plugin_forms.of_schema("precision", Precision.model_json_schema())
    assert "nf4" in form["types"]
    assert [field["name"] for field in form["fields"]] == [
        name for name in Precision.model_fields if name != "type"
    ]
