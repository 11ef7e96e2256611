"""The rules of serving adapters, one test each where no other file holds them.

Elsewhere: strict loading (`engine/test_adapters`), the base's fingerprint and the statuses of
refusals (`test_server`), slots (`engine/test_slots`), one load for all (`test_residency`), fair
admission (`engine/test_scheduler`), containment and pickles (`test_bug_record`).
"""

import asyncio
import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from models.errors import ConflictError, NotFoundError, UnprocessableError
from tests.worker.inference.adapter_service import (
    GREEDY,
    PROMPT,
    SHAPES,
    AdapterService,
    adapter_service,
    wait_for,
)
from tests.worker.inference.conftest import base as base  # the identity of a made-up base
from tests.worker.inference.tiny import ADAPTER_BYTES, Files, collect, submit
from worker.adapter_format import digest_of
from worker.base_models import BaseModelInfo
from worker.inference.engine.adapters import read_adapter
from worker.inference.engine.engine import Request
from worker.inference.engine.errors import AdapterInUseError
from worker.inference.engine.params import Sampling
from worker.inference.residency import FAILURE_SECONDS


@pytest.fixture
def service(tmp_path: Path, base: BaseModelInfo) -> Iterator[AdapterService]:
    with adapter_service(tmp_path, base) as service:
        yield service


def test_rule_1_the_digest_names_the_adapter_in_every_tier(service: AdapterService) -> None:
    ref = service.publish(1)
    service.ask(ref)
    assert ref.digest == digest_of(service.root / "published-1")[0]
    assert (service.root / "cache" / ref.digest).is_dir()
    assert list(service.engine.stats().references) == [ref.digest]
    assert service.engine._runner.slots.digests() == [ref.digest]


def test_rule_2_a_running_answer_ends_on_the_version_it_began_on(service: AdapterService) -> None:
    old, new = service.publish(1), service.publish(2)
    answers = [service.ask(old), service.ask(new)]
    service.slow_down()
    with service.acquire(old) as lease:
        running = submit(service.engine, Request(PROMPT, GREEDY, lease=lease))
    assert [service.ask(new), collect(running)[0]] == [answers[1], answers[0]]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"digest": "f" * 40}, NotFoundError),
        ({"base_fingerprint": "f" * 32}, ConflictError),
    ],
)
def test_rules_4_and_5_nothing_falls_back_to_the_base(
    service: AdapterService, change: dict[str, str], error: type[Exception]
) -> None:
    with pytest.raises(error):
        service.ask(service.publish(1).model_copy(update=change))
    assert service.engine.stats().n_drawn == 0


def test_rule_6_files_are_read_and_checked_off_the_engines_thread(
    service: AdapterService, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def note(*args: Any) -> Any:
        seen.append(threading.current_thread().name)
        return read_adapter(*args)

    monkeypatch.setattr("worker.inference.engine.engine.read_adapter", note)
    service.ask(service.publish(1))
    assert seen == ["passing"]  # the engine's own is `engine`, and its pool the only one


def test_rule_7_who_uses_which_slot_is_told_anew_for_every_pass(service: AdapterService) -> None:
    refs = [service.publish(seed) for seed in (1, 2, 3)]
    alone = [service.ask(ref) for ref in refs]
    for order in ([0, 1, 2], [2, 0, 1], [1, 1, 0]):
        assert service.ask_all([refs[i] for i in order]) == [alone[i] for i in order]
    assert service.engine.stats().slot_evictions > 0


def test_rule_8_a_lease_that_was_lost_is_found_and_given_back(service: AdapterService) -> None:
    ref = service.publish(1)
    lease = service.acquire(ref)
    assert service.engine.audit() == {}
    del lease
    gc.collect()
    assert service.engine.audit() == {ref.digest: 1}
    assert service.engine.audit() == {}
    assert service.engine.unload(ref.digest) == ADAPTER_BYTES


def test_rule_9_failures_are_remembered_for_a_while_by_their_cause(
    service: AdapterService, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = Files(SHAPES)
    files.config["lora_bias"] = True
    bad = service.publish(1, files=files)
    now = [1000.0]
    monkeypatch.setattr("worker.inference.residency.monotonic", lambda: now[0])
    loads: list[int] = []
    load = service.engine.load

    def count(digest: str, directory: Path) -> Any:
        loads.append(1)
        return load(digest, directory)

    monkeypatch.setattr(service.engine, "load", count)
    for seconds in (0, 1, FAILURE_SECONDS[UnprocessableError] - 2, 1):
        now[0] += seconds
        with pytest.raises(UnprocessableError, match="lora_bias"):
            service.ask(bad)
    assert len(loads) == 2
    assert FAILURE_SECONDS[NotFoundError] < FAILURE_SECONDS[UnprocessableError]


def test_rule_10_an_adapter_is_fetched_while_its_request_waits_for_a_turn(
    service: AdapterService,
) -> None:
    service.slow_down()
    endless = Request(PROMPT, Sampling(5000, seed=1))
    blockers = [service.engine.submit(endless, lambda *_: None) for _ in range(16)]
    ref = service.publish(1)
    with service.acquire(ref) as lease:
        waiting = submit(service.engine, Request(PROMPT, GREEDY, lease=lease))
    assert service.engine.stats().waiting == 1
    assert service.engine.stats().references == {ref.digest: 1}
    for blocker in blockers:
        blocker.abort()
    assert collect(waiting)[0]


def test_rule_11_what_is_in_use_is_not_unloaded(service: AdapterService) -> None:
    ref = service.publish(1)
    with service.acquire(ref), pytest.raises(AdapterInUseError):
        service.engine.unload(ref.digest)
    assert [service.engine.unload(ref.digest) for _ in range(2)] == [ADAPTER_BYTES, 0]


def test_rule_13_an_adapter_of_another_chat_template_is_refused(service: AdapterService) -> None:
    with pytest.raises(ConflictError, match="chat template"):
        service.ask(service.publish(1, template_sha256="e" * 64))


def test_rule_14_a_copy_that_is_being_read_is_not_evicted(
    tmp_path: Path, base: BaseModelInfo
) -> None:
    with adapter_service(tmp_path, base) as service:
        service.adapters._budget_bytes = 1
        first, second = service.publish(1), service.publish(2)
        with service.adapters.open(first) as (directory, _):
            service.ask(second)
            assert (directory / "adapter_model.safetensors").is_file()
        assert not directory.exists()
        assert service.ask(first)  # and comes back from the store


def test_many_adapters_over_few_slots_leave_no_references(service: AdapterService) -> None:
    refs = [service.publish(seed) for seed in range(4)]

    async def acquire_and_release() -> None:
        for _ in range(10):
            leases = [await service.residency.acquire(ref) for ref in refs]
            for lease in leases:
                lease.release()

    asyncio.run(acquire_and_release())
    wait_for(lambda: set(service.engine.stats().references.values()) == {0})
    assert service.engine.audit() == {}
