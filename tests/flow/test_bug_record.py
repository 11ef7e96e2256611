"""The most telling bugs of other servers (their issue numbers): each is tested not to be ours.

Not here, because there is nothing here to go wrong: external and encoder caches (vllm #44250,
#44939). What concerns the output has a record of its own.
"""

import asyncio
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from models.domain.generation import AdapterRef
from models.errors import (
    CapacityError,
    NotFoundError,
    TuneryError,
    UnavailableError,
    UnprocessableError,
)
from tests.worker.inference.adapter_service import (
    GREEDY,
    PROMPT,
    SHAPES,
    AdapterService,
    adapter_service,
    wait_for,
)
from tests.worker.inference.conftest import base as base  # the identity of a made-up base
from tests.worker.inference.tiny import ADAPTER_BYTES, Events, Files, collect, submit
from worker.base_models import BaseModelInfo
from worker.inference.engine.adapters import read_adapter
from worker.inference.engine.engine import Request
from worker.inference.engine.errors import AdapterFormatError
from worker.inference.engine.params import Sampling
from worker.inference.engine.scheduler import Limits


@pytest.fixture
def service(tmp_path: Path, base: BaseModelInfo) -> Iterator[AdapterService]:
    with adapter_service(tmp_path, base) as service:
        yield service


def reason(service: AdapterService, seed: int, files: Files) -> str:
    """Publish `files` and return why they are refused."""
    with pytest.raises(UnprocessableError) as caught:
        service.ask(service.publish(seed, files=files))
    return str(caught.value)


def test_01_adapters_loaded_while_others_decode_leave_their_answers_alone(
    service: AdapterService,
) -> None:  # vllm #47724: a busy slot was given away
    running = service.publish(1)
    alone = service.ask(running)
    service.slow_down()
    with service.acquire(running) as lease:
        stream = submit(service.engine, Request(PROMPT, GREEDY, lease=lease))
    others = [service.ask(service.publish(seed)) for seed in (2, 3, 4, 5)]
    assert collect(stream)[0] == alone
    assert len({alone, *others}) == 5


def test_02_a_name_published_anew_answers_as_the_new_one(service: AdapterService) -> None:
    # vllm #42125: prefixes were kept under the name
    first, second = service.publish(1), service.publish(2)
    assert first.name == second.name
    assert service.ask(first) != service.ask(second)


def test_03_two_adapters_of_one_name_never_share_states(service: AdapterService) -> None:
    # vllm #30931: the key was the name, not the identity
    refs = [service.publish(seed) for seed in (1, 2)]
    alone = [service.ask(ref) for ref in refs]
    assert [service.ask(ref) for ref in (*refs, *reversed(refs))] == [*alone, *reversed(alone)]
    assert service.engine.stats().n_cached > 0


def test_04_base_and_adapters_each_have_prefixes_of_their_own(service: AdapterService) -> None:
    # llama.cpp #26207: one prompt cache for every selection of adapters
    ref = service.publish(1)
    base, adapted = service.ask(None), service.ask(ref)
    assert base != adapted
    assert [service.ask(None), service.ask(ref)] == [base, adapted]


def test_07_what_is_unloaded_and_loaded_anew_is_the_new_one(service: AdapterService) -> None:
    # sglang #8263: the buffer kept the old weights of a name that was used again
    old, new = service.publish(1), service.publish(2)
    answers = {ref.digest: service.ask(ref) for ref in (old, new)}
    for ref in (new, old, new):
        assert service.engine.unload(ref.digest) == ADAPTER_BYTES
        assert service.ask(ref) == answers[ref.digest]


@pytest.mark.parametrize("digest", ["0" * 40, "base", ""])
def test_08_09_an_adapter_that_is_not_there_is_never_answered_by_the_base(
    service: AdapterService, digest: str
) -> None:  # TGI #2505, peft #2090: unknown ids were the base's
    with pytest.raises(NotFoundError):
        service.ask(service.publish(1).model_copy(update={"digest": digest}))


@pytest.mark.parametrize("prefix", ["language_model.", "model."])
def test_10_paths_that_match_by_their_end_only_are_refused(
    service: AdapterService, prefix: str
) -> None:  # vllm #34186: listed, 200, and the base's output
    files = Files(SHAPES)
    files.tensors = {
        key.replace("base_model.model.", f"base_model.model.{prefix}"): tensor
        for key, tensor in files.tensors.items()
    }
    assert "unknown_module" in reason(service, 1, files)


def test_11_every_module_of_the_adapter_takes_effect(service: AdapterService) -> None:
    # vllm #55193: a filter of the deployment's left none
    ref = service.publish(1)
    service.ask(ref)
    with service.acquire(ref) as lease:
        changed = set(lease.weights.modules)
        slots = service.engine._runner.slots
        slots.use([lease.weights, None])
    touched = {path for path, number in slots.numbers.items() if slots.is_touched[number]}
    assert touched == changed
    assert len(changed) == 4


def test_12_scales_are_pefts_own_rule(service: AdapterService) -> None:
    # sglang #40835, TRT-LLM #1668: rank-stabilised adapters were √r too weak
    files = Files(SHAPES, r=4)
    files.config |= {
        "use_rslora": True,
        "lora_alpha": 6,
        "alpha_pattern": {"v_proj": 10},
    }
    with service.acquire(service.publish(1, files=files)) as lease:
        q, v = (
            lease.weights.modules[f"model.layers.0.self_attn.{name}"]
            for name in ("q_proj", "v_proj")
        )
    for change, scale, name in ((q, 3.0, "q_proj"), (v, 5.0, "v_proj")):
        stored = files.tensors[f"base_model.model.model.layers.0.self_attn.{name}.lora_B.weight"]
        assert change.b is not None
        assert torch.equal(change.b, scale * stored)


@pytest.mark.parametrize(
    ("feature", "value"), [("modules_to_save", ["lm_head"]), ("trainable_token_indices", [3])]
)
def test_13_what_cannot_be_served_per_adapter_is_refused_and_not_dropped(
    service: AdapterService, feature: str, value: Any
) -> None:  # vllm #9280, #4186: heads of another adapter, or none
    files = Files(SHAPES)
    files.config[feature] = value
    assert feature in reason(service, 1, files)


def test_14_a_copied_list_of_added_tokens_is_no_new_vocabulary(tmp_path: Path) -> None:
    # llama.cpp #9948, sglang #17905
    directory = Files(SHAPES).write(tmp_path)
    (directory / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 1}))
    assert read_adapter(directory, "0" * 40, SHAPES).modules
    files = Files(SHAPES)
    files.tensors["base_model.model.model.embed_tokens.weight"] = torch.ones(257, 64)
    with pytest.raises(AdapterFormatError, match="unknown_tensor"):
        read_adapter(files.write(tmp_path / "more"), "0" * 40, SHAPES)


def test_15_an_adapter_that_vanishes_costs_its_own_request_only(service: AdapterService) -> None:
    # vllm #11727, #5105: one vanished directory ended the server
    gone, good = service.publish(1), service.publish(2)
    alone = service.ask(good)
    for path in (service.store.root / "adapters" / gone.digest).iterdir():
        path.unlink()
    with pytest.raises(NotFoundError):
        service.ask(gone)
    assert service.ask(good) == alone


def test_16_more_adapters_and_the_base_than_slots_are_all_answered(
    service: AdapterService,
) -> None:  # sglang #23141: an assertion killed the server
    refs = [service.publish(seed) for seed in range(4)]
    alone = [service.ask(ref) for ref in (None, *refs)]
    assert service.ask_all([None, *refs] * 3) == alone * 3
    service.wait_until_idle()


@pytest.mark.parametrize("stage", ["waiting", "prompt", "decoding"])
def test_17_an_abort_at_any_stage_gives_the_adapter_back(
    service: AdapterService, stage: str
) -> None:  # sglang #34205, #29179: unload waited for ever
    service.slow_down(0.003)
    ref = service.publish(1)
    events = Events()
    blockers = []
    if stage == "waiting":
        endless = Request(PROMPT, Sampling(10_000, seed=1, ignore_eos=True))
        blockers = [service.engine.submit(endless, lambda *_: None) for _ in range(16)]
    with service.acquire(ref) as lease:
        prompt = PROMPT * 40 if stage == "prompt" else PROMPT
        ticket = service.engine.submit(
            Request(prompt, Sampling(1000, seed=1, ignore_eos=True), lease=lease),
            lambda *event: events.put(event),
        )
    if stage == "decoding":
        events.get(timeout=30)
    ticket.abort()
    wait_for(lambda: service.engine.stats().references == {ref.digest: 0})
    for blocker in blockers:
        blocker.abort()
    assert service.engine.unload(ref.digest) == ADAPTER_BYTES


def test_18_many_choices_release_once_each(service: AdapterService) -> None:
    # sglang #36894, #25864: counters went to −2 after n = 16
    ref = service.publish(1)
    with service.acquire(ref) as lease:
        request = Request(PROMPT, Sampling(4, seed=1, ignore_eos=True), n=8, lease=lease)
        events = submit(service.engine, request)
        ends = 0
        while ends < 8:
            _, event = events.get(timeout=60)
            assert not isinstance(event, Exception)
            ends += event.finish_reason is not None
        lease.release()
    service.wait_until_idle()
    assert service.engine.audit() == {}
    assert service.engine.stats().references == {ref.digest: 0}


def test_19_unloading_frees_the_memory_and_says_how_much(service: AdapterService) -> None:
    # vllm #54839, #42633: success was reported and the memory stayed
    ref = service.publish(1)
    service.ask(ref)
    service.wait_until_idle()
    before = service.engine.stats().adapter_bytes
    freed = service.engine.unload(ref.digest)
    assert freed == ADAPTER_BYTES == before - service.engine.stats().adapter_bytes
    assert service.engine.unload(ref.digest) == 0


def test_20_an_adapter_is_read_once_however_often_it_answers(service: AdapterService) -> None:
    # vllm #33791: read from the disk in every step
    ref = service.publish(1)
    for _ in range(3):
        service.ask(ref)
    assert len(service.store.reads) == 3  # the manifest and two files


def test_21_fifty_first_requests_are_one_load_and_fifty_answers(
    service: AdapterService,
) -> None:  # dynamo #5184, vllm #20636: check, then act
    ref = service.publish(1)
    alone = service.ask(ref)
    service.wait_until_idle()
    service.engine.unload(ref.digest)
    reads = len(service.store.reads)
    assert service.ask_all([ref] * 50) == [alone] * 50
    assert len(service.store.reads) == reads  # from the disk; and once into memory
    service.wait_until_idle()
    assert service.engine.unload(ref.digest) == ADAPTER_BYTES
    assert service.engine.unload(ref.digest) == 0


def test_22_what_was_loaded_can_be_asked_at_once(service: AdapterService) -> None:
    # dynamo #11163, aibrix #235: reported as running, then 404 for ever
    ref = service.publish(1)
    service.acquire(ref).release()
    lease = service.engine.acquire(ref.digest)
    assert lease is not None
    with lease:
        assert collect(submit(service.engine, Request(PROMPT, GREEDY, lease=lease)))[0]


def test_23_an_adapter_that_can_never_load_is_not_tried_again_and_blocks_nobody(
    service: AdapterService,
) -> None:  # gateway-api-inference-extension #584
    files = Files(SHAPES)
    files.config["r"] = 8  # the tensors have rank 4
    bad, good = service.publish(1, files=files), service.publish(2)

    async def ask(ref: AdapterRef) -> str:
        try:
            (await service.residency.acquire(ref)).release()
        except TuneryError as error:
            return str(error)
        return "loaded"

    async def ask_all() -> list[str]:
        return await asyncio.gather(*(ask(ref) for ref in [bad, good, bad, bad]))

    first, second, *others = asyncio.run(ask_all())
    assert "shape_mismatch" in first
    assert second == "loaded"
    assert others == [first, first]
    for path in (service.root / "cache" / bad.digest).iterdir():
        path.unlink()
    reads = len(service.store.reads)
    assert asyncio.run(ask(bad)) == first
    assert len(service.store.reads) == reads


def test_24_a_rare_adapter_is_not_starved_by_those_that_keep_coming(
    tmp_path: Path, base: BaseModelInfo
) -> None:  # sglang #13349, vllm #16876: never scheduled, or after six seconds
    limits = Limits(n_slots=1, overtake_tokens=1000)
    with adapter_service(tmp_path, base, limits=limits) as service:
        busy, rare = service.publish(1), service.publish(2)
        with service.acquire(busy) as one, service.acquire(rare) as two:
            order: list[str] = []

            def note(name: str) -> Any:
                def emit(index: int, event: Any) -> None:
                    if event.finish_reason is not None:
                        order.append(name)

                return emit

            for number in range(40):
                lease, name = (two, "rare") if number == 1 else (one, "busy")
                request = Request((*PROMPT, number + 1), Sampling(20, temperature=0), lease=lease)
                service.engine.submit(request, note(name))
            wait_for(lambda: "rare" in order)
        # 1000 tokens may pass, 91 each: eleven requests, and the one that ran already.
        assert order.index("rare") <= 12


@pytest.mark.parametrize("digest", ["../../etc", "..%2f..", "a/../b", "a" * 39 + "/"])
def test_25_no_reference_leads_out_of_the_cache(service: AdapterService, digest: str) -> None:
    # sglang #26789, lorax #798: path traversal through the adapter's id
    outside = service.root / "etc"
    with pytest.raises(NotFoundError):
        service.ask(service.publish(1).model_copy(update={"digest": digest}))
    assert not outside.exists()
    assert service.store.reads == []


def test_25_pickled_weights_are_never_opened(tmp_path: Path) -> None:
    # TRT-LLM #13391: torch.load without weights_only
    directory = Files(SHAPES).write(tmp_path)
    (directory / "adapter_model.safetensors").unlink()
    (directory / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")
    with pytest.raises(AdapterFormatError, match="pickled"):
        read_adapter(directory, "0" * 40, SHAPES)


def test_also_a_tensor_that_is_there_twice_is_seen(tmp_path: Path) -> None:
    # unsloth-zoo #941: gate loaded twice, up never, and all shapes agree
    directory = Files(SHAPES).write(tmp_path)
    file = directory / "adapter_model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length]
    renamed = header.replace(
        b"layers.1.self_attn.q_proj.lora_A", b"layers.0.self_attn.q_proj.lora_A"
    )
    file.write_bytes(data[:8] + renamed + data[8 + length :])
    with pytest.raises(AdapterFormatError, match="occurs twice"):
        read_adapter(directory, "0" * 40, SHAPES)


def test_also_memory_full_of_adapters_in_use_is_a_matter_of_capacity(
    tmp_path: Path, base: BaseModelInfo
) -> None:  # tensorrtllm_backend #559: the cache full with nothing to evict
    with adapter_service(tmp_path, base, n_resident=1) as service:
        first, second = service.publish(1), service.publish(2)
        with service.acquire(first), pytest.raises((CapacityError, UnavailableError)):
            service.ask(second)
        assert service.ask(second)
