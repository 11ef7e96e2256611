"""The generated page of settings."""

from models.settings import ENV_PREFIX, Settings
from models.settings_table import settings_page


def row(variable: str) -> list[str]:
    line = next(line for line in settings_page().splitlines() if line.startswith(f"| `{variable}`"))
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def test_has_one_row_for_each_setting() -> None:
    page = settings_page()
    n_settings = 0
    for name, field in Settings.model_fields.items():
        members = getattr(field.annotation, "model_fields", None)
        variables = [f"{name}__{member}" for member in members] if members else [name]
        n_settings += len(variables)
        for variable in variables:
            assert page.count(f"\n| `{ENV_PREFIX}{variable.upper()}` |") == 1
    assert page.count(f"\n| `{ENV_PREFIX}") == n_settings


def test_a_row_tells_kind_range_default_and_meaning() -> None:
    assert row("TUNERY_API__PORT") == [
        "`TUNERY_API__PORT`",
        "integer ≥ 0, ≤ 65,535",
        "`8470`",
        "Port the API listens on.",
    ]
    assert row("TUNERY_WORKER__LEASE_SECONDS")[1:3] == ["number > 0", "`30`"]
    assert row("TUNERY_WORKER__WARM_SPARE")[1:3] == ["`true` or `false`", "`true`"]
    assert row("TUNERY_MODELS__CATALOG")[1] == "JSON"
    assert row("TUNERY_CLIENT__API_KEY")[1:3] == ["secret", "–"]
    assert row("TUNERY_STORAGE__ENDPOINT")[1:3] == ["text", "–"]


def test_rows_have_four_cells() -> None:
    rows = [line for line in settings_page().splitlines() if line.startswith("| `")]
    assert rows
    for line in rows:
        assert len(line.replace("\\|", "").split("|")) == 6, line
