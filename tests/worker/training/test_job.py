"""Whole jobs in this process: real rows, a real store, a tiny model, every way to be cut off."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest

from models.domain.reports import AdapterManifest
from models.registry import adapters, checkpoints, job_runs
from models.storage import adapter_prefix, fetch_file, upload_key
from models.tables import File
from tests.worker.training.service import Service, chat_rows
from worker.training import exit_codes
from worker.training.task import Stop


def stop_after(step: int, stop: Stop) -> Callable[[], Stop | None]:
    """Ask to stop once `step` steps are done."""
    calls = {"n": 0}

    def asked() -> Stop | None:
        calls["n"] += 1
        return stop if calls["n"] > step else None

    return asked


def adapter_digest(service: Service, **changes: Any) -> str:
    """The digest that an uninterrupted run comes to."""
    job = service.submit(**changes)
    assert service.run(job) == exit_codes.DONE
    return next(row.digest for row in service.adapters() if row.job_id == job.id)


def test_a_job_ends_with_an_adapter_under_its_name(service: Service) -> None:
    job = service.submit()
    assert service.run(job) == exit_codes.DONE
    done = service.job(job.id)
    (adapter,) = service.adapters()
    assert done.status == "succeeded"
    assert done.fine_tuned_model == adapter.name
    assert adapter.name.startswith("ft:tiny:local:numbers:")
    assert (done.step, done.total_steps) == (6, 6)
    assert done.trained_tokens == sum(point.tokens for point in service.trace(job.id))
    assert done.lease_owner is None


def test_the_adapter_in_the_store_is_what_its_row_says(service: Service, tmp_path: Any) -> None:
    assert service.run(service.submit()) == exit_codes.DONE
    (adapter,) = service.adapters()
    manifest = AdapterManifest.model_validate(adapter.manifest)
    assert manifest.digest == adapter.digest
    assert (manifest.base_model, manifest.method, manifest.objective) == ("tiny", "lora", "sft")
    assert (manifest.step, manifest.precision["type"]) == (6, "fp32")
    for file in manifest.files:
        key = f"{adapter_prefix(adapter.digest)}/{file.name}"
        fetch_file(service.store, key, tmp_path / file.name, sha256=file.sha256)


def test_events_come_in_openais_order(service: Service) -> None:
    service.upload("file-valid", chat_rows(16)[12:])
    job = service.submit(validation_file="file-valid")
    assert service.run(job) == exit_codes.DONE
    messages = service.messages(job.id)
    starts = [
        "Created fine-tuning job: ",
        "Validating training file: file-train and validation file: file-valid",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
        "Step 0/6: full validation loss=",
        "Step 1/6: training loss=",
        "Step 2/6: training loss=",
        "Step 3/6: training loss=",
        "Checkpoint created at step 3 with Snapshot ID: ft:tiny:local:numbers:",
        "Step 4/6: training loss=",
        "Step 5/6: training loss=",
        "Step 6/6: training loss=",
        "Checkpoint created at step 6 with Snapshot ID: ft:tiny:local:numbers:",
        "New fine-tuned model created: ft:tiny:local:numbers:",
        "The job has successfully completed",
    ]
    assert len(messages) == len(starts)
    for message, start in zip(messages, starts, strict=True):
        assert message.startswith(start)
    assert "full validation loss=" in messages[7]
    assert messages[8].endswith(":ckpt-step-3")


def test_the_results_file_has_openais_columns_first(service: Service) -> None:
    job = service.submit()
    service.run(job)
    with service.database.read() as session:
        file = session.get_one(File, service.job(job.id).result_file)
    data = service.store.get(upload_key(file.id))
    header, *lines = data.decode().splitlines()
    assert header.startswith(
        "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy,epoch,"
    )
    assert [line.split(",")[0] for line in lines] == ["1", "2", "3", "4", "5", "6"]
    assert float(lines[0].split(",")[1]) == service.trace(job.id)[0].train_loss
    assert (file.purpose, file.status, file.filename) == (
        "fine-tune-results",
        "processed",
        "step_metrics.csv",
    )
    assert file.bytes == len(data)


def test_what_was_auto_is_recorded_as_numbers(service: Service) -> None:
    job = service.submit(hyperparameters={})
    assert job.spec["hyperparameters"]["n_epochs"] == "auto"
    service.run(job)
    spec = service.job(job.id).spec
    assert spec["hyperparameters"] == {
        "n_epochs": 8,
        "batch_size": 1,
        "learning_rate_multiplier": 1.0,
    }
    assert spec["optimizer"]["learning_rate"] == 1e-3


def test_nothing_is_left_in_the_scratch_directory(service: Service) -> None:
    service.run(service.submit())
    assert list(service.settings.worker.scratch_dir.iterdir()) == []


@pytest.mark.parametrize("step", [2, 3])
def test_a_drained_job_goes_on_exactly_where_it_was(service: Service, step: int) -> None:
    expected = adapter_digest(service)
    job = service.submit()
    asked = stop_after(step, Stop.DRAIN)
    assert service.run(job, asked) == exit_codes.DRAINED
    assert [row.step for row in service.checkpoints(job.id)][-1] == step
    with service.database.write() as session:
        job_runs.release(session, job.id, job.attempt, "The worker shuts down.")
    again = service.claim()
    assert again.attempt == 2
    assert service.run(again) == exit_codes.DONE
    (adapter,) = [row for row in service.adapters() if row.job_id == job.id]
    assert adapter.digest == expected
    assert [point.step for point in service.trace(job.id)] == [1, 2, 3, 4, 5, 6]


def test_a_cancelled_job_leaves_no_checkpoint(service: Service) -> None:
    job = service.submit()
    asked = stop_after(2, Stop.CANCEL)
    assert service.run(job, asked) == exit_codes.CANCELLED
    assert service.checkpoints(job.id) == []
    assert [point.step for point in service.trace(job.id)] == [1, 2]
    assert service.job(job.id).status == "running"  # its parent ends it


def test_a_crash_between_objects_and_row_costs_only_steps(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = adapter_digest(service)
    job = service.submit()
    with monkeypatch.context() as patch:

        def crash(*_: Any) -> None:
            raise RuntimeError("power cut")

        patch.setattr(checkpoints, "record", crash)
        assert service.run(job) == 1
    assert service.job(job.id).status == "running"
    assert service.checkpoints(job.id) == []
    assert service.keys(f"jobs/{job.id}")
    assert service.run(service.requeue(job)) == exit_codes.DONE
    (adapter,) = [row for row in service.adapters() if row.job_id == job.id]
    assert adapter.digest == expected
    assert not [key for key in service.keys(f"jobs/{job.id}") if "-a1/" in key]


def test_a_crash_while_publishing_ends_in_exactly_one_adapter(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = service.submit()
    with monkeypatch.context() as patch:

        def crash(*_: Any, **__: Any) -> None:
            raise RuntimeError("power cut")

        patch.setattr(job_runs, "succeed", crash)
        assert service.run(job) == 1
    assert service.adapters() == []
    assert service.job(job.id).fine_tuned_model is None
    trace = service.trace(job.id)
    assert service.run(service.requeue(job)) == exit_codes.DONE
    assert len(service.adapters()) == 1
    assert service.trace(job.id) == trace  # no step was repeated
    assert service.run(job) == exit_codes.LEASE_LOST
    assert len(service.adapters()) == 1


def test_a_trainer_that_lost_its_lease_changes_nothing_more(service: Service) -> None:
    job = service.submit(checkpoint_steps=2)
    taken: list[Any] = []

    def asked() -> None:
        if not taken and service.job(job.id).step >= 1:
            taken.append(service.requeue(job))

    assert service.run(job, asked) == exit_codes.LEASE_LOST
    assert taken[0].attempt == 2
    assert service.checkpoints(job.id) == []
    assert service.adapters() == []
    assert service.run(taken[0]) == exit_codes.DONE


def test_the_newest_two_checkpoints_and_the_best_are_kept(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.upload("file-valid", chat_rows(16)[12:])
    record = checkpoints.record

    def first_is_best(session: Any, row: Any) -> None:
        row.metrics = {**row.metrics, "full_valid_loss": float(row.step)}
        record(session, row)

    monkeypatch.setattr(checkpoints, "record", first_is_best)
    job = service.submit(checkpoint_steps=1, validation_file="file-valid")
    assert service.run(job) == exit_codes.DONE
    rows = service.checkpoints(job.id)
    assert [row.step for row in rows] == [1, 5, 6]
    prefixes = {key.rpartition("/")[0] for key in service.keys("jobs")}
    assert prefixes == {row.object_prefix for row in rows}
    kept = {key.split("/")[1] for key in service.keys("adapters")}
    assert kept == {row.adapter_digest for row in rows}


def test_a_full_disk_ends_the_job_before_its_first_step(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    job = service.submit()
    assert service.run(job) == exit_codes.FAILED
    failed = service.job(job.id)
    assert (failed.error_code, failed.step) == ("storage_full", 0)


def test_content_that_another_job_uses_is_not_deleted(service: Service) -> None:
    other = service.submit(checkpoint_steps=1)
    service.run(other, stop_after(2, Stop.DRAIN))
    shared = service.checkpoints(other.id)[0].adapter_digest
    job = service.submit(checkpoint_steps=1)
    service.run(job)
    assert shared not in {row.adapter_digest for row in service.checkpoints(job.id)}
    assert len(service.keys(adapter_prefix(shared))) == 3


def test_content_that_went_missing_is_put_back_with_the_row(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = adapters.publish
    fence = job_runs.fence
    job = service.submit()

    def delete_all(session: Any, job_id: str, attempt: int, **values: Any) -> None:
        fence(session, job_id, attempt, **values)
        for key in service.keys("adapters"):
            service.store.delete(key)

    def check(session: Any, row: Any) -> None:
        publish(session, row)
        assert len(service.keys(adapter_prefix(row.digest))) == 3

    monkeypatch.setattr(job_runs, "fence", delete_all)
    monkeypatch.setattr(adapters, "publish", check)
    assert service.run(job) == exit_codes.DONE
    assert len(service.adapters()) == 1


TOOL = {"type": "function", "function": {"name": "depth"}}  # the tiny base's template ignores it


def test_bad_rows_fail_the_job_with_file_line_and_remedy(service: Service) -> None:
    service.upload("file-bad", [*chat_rows(2), {**chat_rows(1)[0], "tools": [TOOL]}])
    job = service.submit(training_file="file-bad")
    assert service.run(job) == exit_codes.FAILED
    failed = service.job(job.id)
    assert failed.status == "failed"
    assert (failed.error_code, failed.error_param) == ("invalid_file_format", "training_file")
    assert "Line 3" in (failed.error_message or "")


def test_skipped_rows_are_told_of_in_a_warning(service: Service) -> None:
    service.upload("file-bad", [*chat_rows(3), {"messages": []}])
    job = service.submit(training_file="file-bad", on_error="skip")
    assert service.run(job) == exit_codes.DONE
    warning = "Of 4 rows of the training file, 1 row was skipped because of errors."
    assert warning in service.messages(job.id)


def test_a_job_without_packing_is_padded_and_learns_the_same(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = service.submit()
    assert service.run(packed) == exit_codes.DONE
    monkeypatch.delattr("worker.training.job.choose_forward")
    padded = service.submit(packing=False)
    assert service.run(padded) == exit_codes.DONE
    losses = [[each.train_loss for each in service.trace(job.id)] for job in (packed, padded)]
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)
    assert not any("padding" in message for message in service.messages(padded.id))


def test_a_bad_validation_file_is_named_as_such(service: Service) -> None:
    service.upload("file-bad", [{**chat_rows(1)[0], "tools": [TOOL]}])
    job = service.submit(validation_file="file-bad")
    assert service.run(job) == exit_codes.FAILED
    assert service.job(job.id).error_param == "validation_file"


def test_missing_bytes_fail_the_job(service: Service) -> None:
    job = service.submit()
    with service.database.read() as session:
        rows_key = session.get_one(File, "file-train").rows_key
    assert rows_key is not None
    service.store.delete(rows_key)
    assert service.run(job) == exit_codes.FAILED
    assert service.job(job.id).error_code == "file_not_found"


def test_targets_that_the_base_does_not_have_fail_the_job(service: Service) -> None:
    peft = {"type": "lora", "target_modules": ["query"]}
    job = service.submit(peft=peft)
    assert service.run(job) == exit_codes.FAILED
    assert service.job(job.id).error_param == "peft.target_modules"


def test_memory_that_runs_out_fails_the_job(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhaust(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("worker.training.loop.Trainer.step", exhaust)
    job = service.submit()
    assert service.run(job) == exit_codes.FAILED
    assert service.job(job.id).error_code == "out_of_memory"


def test_an_unexpected_error_leaves_the_job_to_its_parent(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(*_: Any) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr("worker.training.loop.Trainer.step", break_down)
    job = service.submit()
    assert service.run(job) == 1
    assert service.job(job.id).status == "running"
