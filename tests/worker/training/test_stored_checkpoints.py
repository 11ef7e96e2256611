"""Back from the store: the newest good checkpoint, the best one, an adapter to go on from."""

from typing import Any

import pytest

from models.storage import adapter_prefix
from models.tables import Adapter
from tests.worker.training.service import Service, chat_rows
from tests.worker.training.test_job import adapter_digest, stop_after
from worker.training import exit_codes, methods
from worker.training.task import Stop


@pytest.mark.parametrize("name", ["optimizer.safetensors", "trainer.json", "manifest.json"])
def test_a_damaged_checkpoint_gives_way_to_an_older_one(service: Service, name: str) -> None:
    expected = adapter_digest(service, checkpoint_steps=1)
    job = service.submit(checkpoint_steps=1)
    service.run(job, stop_after(3, Stop.DRAIN))
    newest = service.checkpoints(job.id)[-1]
    service.store.put(f"{newest.object_prefix}/{name}", b"{}")
    again = service.requeue(job)
    assert service.run(again) == exit_codes.DONE
    assert any("checkpoint of step 3 cannot be used" in m for m in service.messages(job.id))
    (adapter,) = [row for row in service.adapters() if row.job_id == job.id]
    assert adapter.digest == expected


def test_without_any_good_checkpoint_a_job_starts_over(service: Service) -> None:
    expected = adapter_digest(service)
    job = service.submit()
    service.run(job, stop_after(2, Stop.DRAIN))
    (only,) = service.checkpoints(job.id)
    service.store.delete(f"{adapter_prefix(only.adapter_digest)}/adapter_model.safetensors")
    assert service.run(service.requeue(job)) == exit_codes.DONE
    (adapter,) = [row for row in service.adapters() if row.job_id == job.id]
    assert adapter.digest == expected


def test_early_stopping_publishes_the_best_step_and_not_the_last(service: Service) -> None:
    unlike = [
        {"messages": [row["messages"][0], {"role": "assistant", "content": "qzx vjk wyw!"}]}
        for row in chat_rows(4)
    ]
    service.upload("file-valid", unlike)
    job = service.submit(
        validation_file="file-valid",
        hyperparameters={"n_epochs": 12, "batch_size": 4},
        optimizer={"learning_rate": 0.01, "schedule": "constant"},
        early_stopping={"patience": 2},
        checkpoint_steps=1000,
    )
    assert service.run(job) == exit_codes.DONE
    trace = service.trace(job.id)
    losses = {
        point.step: point.full_valid_loss for point in trace if point.full_valid_loss is not None
    }
    best = min(losses, key=lambda step: losses[step])
    assert best < trace[-1].step
    (adapter,) = service.adapters()
    assert adapter.manifest["step"] == best
    kept = {row.step: row.adapter_digest for row in service.checkpoints(job.id)}
    assert adapter.digest == kept[best] != kept[trace[-1].step]
    done = service.job(job.id)
    assert done.trained_tokens == sum(point.tokens for point in trace)
    assert any(f"The adapter is that of step {best}" in each for each in service.messages(job.id))


def going_on_from(adapter: Adapter, **changes: Any) -> dict[str, Any]:
    reference = {
        "name": adapter.name,
        "digest": adapter.digest,
        "base_model": "tiny",
        "base_fingerprint": adapter.manifest["base_fingerprint"],
    }
    return {"init_adapter": reference | changes}


def test_a_job_goes_on_from_the_weights_of_an_adapter(service: Service) -> None:
    service.run(service.submit(optimizer={"learning_rate": 0.01, "schedule": "constant"}))
    (first,) = service.adapters()
    job = service.submit(optimizer={"learning_rate": 1e-6}, **going_on_from(first))
    assert service.run(job) == exit_codes.DONE
    fresh = service.submit(optimizer={"learning_rate": 1e-6})
    service.run(fresh)
    went_on, anew = (service.trace(each.id)[0].train_loss for each in (job, fresh))
    assert went_on < anew - 0.5
    (second,) = [row for row in service.adapters() if row.job_id == job.id]
    assert second.digest != first.digest


def test_a_start_that_is_gone_or_does_not_fit_fails_the_job(service: Service) -> None:
    service.run(service.submit())
    (first,) = service.adapters()
    other_rank = methods.parse_params({"type": "lora", "r": 8}).model_dump()
    for changes, reason in (
        (going_on_from(first, digest="0" * 40), "it was deleted"),
        (going_on_from(first, base_fingerprint="0" * 32), "the base model has changed"),
        (going_on_from(first) | {"peft": other_rank}, "other parameters"),
    ):
        job = service.submit(**changes)
        assert service.run(job) == exit_codes.FAILED
        failed = service.job(job.id)
        assert (failed.error_code, failed.error_param) == ("start_not_usable", "model")
        assert reason in (failed.error_message or "")
