"""The matrix as the page, the command and the API show it."""

import json

import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from api.cli.commands import app
from api.methods.catalogue import PAGE, catalogue, with_table
from tests.api.calls import new_job
from worker.training import methods, objectives


def test_the_table_of_methods_is_up_to_date() -> None:
    page = PAGE.read_text()
    assert page == with_table(page), "run: python -m api.methods.catalogue"
    assert all(f"| `{name}` |" in page for name in methods.all_methods())


def test_every_method_is_described_with_its_defaults_and_all_that_goes_with_it() -> None:
    found = {each["id"]: each for each in catalogue()["data"]}
    assert set(found) == set(methods.all_methods())
    for name, each in found.items():
        assert methods.parse_params({"type": name}).model_dump() == each["defaults"]
        assert set(each["defaults"]) == set(each["schema"]["properties"])
        assert each["when"].endswith(".")
        assert set(each["objectives"]) <= set(objectives.all_objectives())
    assert found["full"]["precisions"] == ["bf16", "fp32"]
    assert found["lora"]["served"] == "batched"


def test_the_api_and_the_command_give_the_same(client: TestClient) -> None:
    answer = client.get("/v1/methods")
    assert answer.status_code == 200
    assert answer.json() == catalogue()
    printed = CliRunner().invoke(app, ["methods", "--json"])
    assert json.loads(printed.stdout) == json.loads(json.dumps(catalogue()))
    assert "houlsby" in CliRunner().invoke(app, ["methods"]).stdout


@pytest.mark.parametrize(
    ("peft", "precision", "param"),
    [
        ({"type": "full"}, "nf4", "precision.type"),
        ({"type": "houlsby", "r": 0}, "bf16", "peft.r"),
        ({"type": "hulsby"}, "bf16", "peft.type"),
    ],
)
def test_what_does_not_go_together_is_refused(
    client: TestClient, peft: dict[str, object], precision: str, param: str
) -> None:
    answer = new_job(client, peft=peft, precision={"type": precision})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_a_method_that_takes_no_nf4_has_another_default(client: TestClient) -> None:
    job = new_job(client, peft={"type": "full"}).json()
    assert job["precision"]["type"] == "bf16"
