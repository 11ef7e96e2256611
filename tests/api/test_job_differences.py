"""What two jobs differ in."""

from api.job_differences import differ, differences, settings


def test_only_what_differs_is_shown_with_the_names_of_nested_fields() -> None:
    first = {"id": "a", "seed": 1, "peft": {"r": 8, "alpha": 16}, "metrics": None}
    second = {"id": "b", "seed": 1, "peft": {"r": 16, "alpha": 16}, "metrics": {"train_loss": 2.0}}
    assert differences([first, second]) == [
        ("peft.r", [8, 16]),
        ("metrics.train_loss", [None, 2.0]),
    ]


def test_settings_are_told_from_how_a_job_went() -> None:
    first = {"id": "a", "seed": 1, "status": "failed", "error": {"code": "x"}, "step": 3}
    second = {"id": "b", "seed": 2, "status": "running", "error": None, "step": 4}
    third = {**second, "seed": 1}
    asked = settings([first, second, third])
    assert [row for row in asked if differ(row[1])] == [("seed", [1, 2, 1])]


def test_a_job_does_not_differ_from_itself() -> None:
    job = {"id": "a", "metadata": {}, "error": None, "peft": {"r": 8}}
    assert differences([job, {**job, "id": "b", "created_at": 7}]) == []
