"""What is vLLM's alone: its faults, its refusals, and what reaches it."""

import threading
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from models.errors import UnavailableError
from tests.worker.inference.engine.test_engine import wait_for
from tests.worker.inference.engine.test_sampler import Only
from tests.worker.inference.tiny import Files, collect, generate, shapes_of, submit, tiny_llama
from tests.worker.inference.vllm.conftest import MakeAdapter, connect
from tests.worker.inference.vllm.fake import FakeVllm
from worker.chat import ChatRenderer
from worker.inference.engine.engine import Request
from worker.inference.engine.errors import (
    AdapterFormatError,
    EngineClosedError,
    GenerationError,
    RequestRefusedError,
)
from worker.inference.engine.grammar import Vocabulary
from worker.inference.engine.params import Sampling
from worker.inference.vllm.engine import VllmEngine

PROMPT = (72, 101, 108, 108, 111)
GREEDY = Sampling(max_tokens=16, temperature=0)
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


def test_adapters_are_loaded_once_by_digest_and_unloaded_when_they_make_room(
    engine: VllmEngine, fake: FakeVllm, adapter: MakeAdapter
) -> None:
    for seed in (1, 2, 1, 3):
        lease = engine.acquire(f"d{seed}") or engine.load(f"d{seed}", adapter(seed))
        with lease:
            generate(engine, Request(PROMPT, GREEDY, lease=lease))
    assert fake.calls == [(LOAD, "d1"), (LOAD, "d2"), (UNLOAD, "d2"), (LOAD, "d3")]
    models = [body["model"] for body in fake.bodies if body.get("stream")]
    assert models == ["d1", "d2", "d1", "d3"]


def test_many_loads_of_one_adapter_at_once_are_one(
    engine: VllmEngine, fake: FakeVllm, adapter: MakeAdapter
) -> None:
    directory = adapter(1)
    threads = [
        threading.Thread(target=lambda: engine.load("d1", directory).release()) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fake.calls == [(LOAD, "d1")]
    assert engine.stats().references == {"d1": 0}


def test_vllm_reads_files_that_stay_when_the_cache_drops_its_copy(
    engine: VllmEngine, adapter: MakeAdapter, tmp_path: Path
) -> None:
    directory = adapter(1)
    engine.load("d1", directory).release()
    for file in directory.iterdir():
        file.unlink()
    [link] = (tmp_path / "cache").glob(".vllm-*/d1")
    assert sorted(path.name for path in link.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    engine.unload("d1")
    assert not link.exists()
    engine.close()
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_vllm_cannot_do_is_refused_before_it_is_asked(
    engine: VllmEngine, fake: FakeVllm, tmp_path: Path, adapter: MakeAdapter
) -> None:
    dora = Files(shapes_of(tiny_llama()), size=0.4)
    dora.config["use_dora"] = True
    for key in [key for key in dora.tensors if "lora_A" in key]:
        path = key.removesuffix("lora_A.weight")
        rows = len(dora.tensors[f"{path}lora_B.weight"])
        dora.tensors[f"{path}lora_magnitude_vector"] = dora.tensors[key].new_ones(rows)
    with pytest.raises(AdapterFormatError, match=r"unsupported_by_vllm.*DoRA"):
        engine.load("dora", dora.write(tmp_path / "dora"))
    with pytest.raises(AdapterFormatError, match=r"rank 16.*up to 8.*VLLM_MAX_LORA_RANK"):
        engine.load("large", adapter(1, r=16))
    ia3 = Files(shapes_of(tiny_llama()))
    ia3.config = {"peft_type": "IA3", "target_modules": ["v_proj"], "feedforward_modules": []}
    ia3.tensors = {
        key.replace("lora_B.weight", "ia3_l"): tensor[:, :1] + 1
        for key, tensor in ia3.tensors.items()
        if key.endswith("v_proj.lora_B.weight")
    }
    with pytest.raises(AdapterFormatError, match=r"unsupported_by_vllm.*no LoRA"):
        engine.load("ia3", ia3.write(tmp_path / "ia3"))
    assert fake.calls == []
    assert engine.stats().references == {}


def test_what_vllm_itself_refuses_is_an_error_with_its_words(
    fake: FakeVllm, engine: VllmEngine, adapter: MakeAdapter
) -> None:
    fake._max_rank = 2
    with pytest.raises(AdapterFormatError, match=r"refused_by_vllm.*greater than max_lora_rank 2"):
        engine.load("d1", adapter(1))
    assert engine.acquire("d1") is None
    assert generate(engine, Request(PROMPT, GREEDY))[1].n_tokens > 0


def test_an_adapter_with_which_vllm_answers_as_the_base_is_refused(
    fake: FakeVllm, engine: VllmEngine, adapter: MakeAdapter
) -> None:
    fake.ignores_adapters = True
    with pytest.raises(AdapterFormatError, match=r"no_effect.*as the base"):
        engine.load("d1", adapter(1))
    assert fake.calls == [(LOAD, "d1"), (UNLOAD, "d1")]


def test_a_load_that_only_we_gave_up_is_taken_for_done(
    fake: FakeVllm, engine: VllmEngine, adapter: MakeAdapter
) -> None:
    assert fake.load("d1", adapter(1))[0] == 200
    engine.load("d1", adapter(1)).release()
    assert engine.stats().references == {"d1": 0}


@pytest.mark.parametrize("how", ["500", "in the middle", "nothing for too long"])
def test_an_error_of_vllm_is_the_error_of_one_request(
    how: str, fake: FakeVllm, tmp_path: Path, adapter: MakeAdapter
) -> None:
    engine = connect(fake, tmp_path / "cache", stall_seconds=0.3)
    with engine.load("d1", adapter(1)) as lease:
        healthy = submit(
            engine, Request(PROMPT, Sampling(100, temperature=0, ignore_eos=True), lease=lease)
        )
        wait_for(lambda: engine.stats().n_drawn > 0)
        fake.status = 500 if how == "500" else 200
        fake.break_after = 3 if how == "in the middle" else None
        fake.seconds_a_token = 1.0 if how.startswith("nothing") else 0.0
        failing = submit(engine, Request(PROMPT, GREEDY, lease=lease))
        with pytest.raises(GenerationError, match=r"vLLM"):
            collect(failing)
        fake.seconds_a_token, fake.break_after, fake.status = 0.0, None, 200
        if how == "500":
            assert collect(healthy)[1].n_tokens == 100
        assert generate(engine, Request(PROMPT, GREEDY))[1].n_tokens > 0
    wait_for(lambda: engine.stats().running == 0)
    assert engine.stats().references == {"d1": 0}
    assert engine.audit() == {}
    engine.close()


def test_a_dead_vllm_ends_its_requests_and_takes_no_more(
    fake: FakeVllm, engine: VllmEngine, adapter: MakeAdapter
) -> None:
    lease = engine.load("d1", adapter(1))
    running = submit(engine, Request(PROMPT, Sampling(4000, ignore_eos=True), lease=lease))
    wait_for(lambda: engine.stats().n_drawn > 0)
    fake.stop()
    with pytest.raises(GenerationError):
        collect(running)
    lease.release()
    assert not engine.stats().alive
    with pytest.raises(EngineClosedError):
        engine.submit(Request(PROMPT, GREEDY), lambda *_: None)
    with pytest.raises(UnavailableError):
        engine.load("d2", adapter(2))
    assert engine.stats().references == {"d1": 0}


def test_a_vllm_that_is_not_well_is_stopped(fake: FakeVllm, engine: VllmEngine) -> None:
    fake.health = 503
    wait_for(lambda: not engine.stats().alive)
    wait_for(lambda: not fake.is_alive)
    with pytest.raises(EngineClosedError):
        engine.submit(Request(PROMPT, GREEDY), lambda *_: None)


def test_a_request_that_vllm_refuses_is_at_fault_itself(fake: FakeVllm, engine: VllmEngine) -> None:
    fake.status = 400
    with pytest.raises(RequestRefusedError, match=r"vLLM refuses: It was asked to fail"):
        generate(engine, Request(PROMPT, GREEDY))


def test_a_constraint_that_cannot_be_written_down_is_refused(
    fake: FakeVllm, engine: VllmEngine
) -> None:
    with pytest.raises(RequestRefusedError) as caught:
        generate(engine, Request(PROMPT, GREEDY, constraint=lambda: Only(65)))
    assert caught.value.param == "response_format"
    assert fake.bodies == []


def test_a_grammar_goes_to_vllm_as_it_was_written(
    fake: FakeVllm, engine: VllmEngine, tokenizers: tuple[PreTrainedTokenizerBase, ChatRenderer]
) -> None:
    lark = 'start: "yes" | "no"'
    grammar = Vocabulary(tokenizers[0], [2]).compile(lark)
    generate(engine, Request(PROMPT, GREEDY, constraint=grammar))
    assert fake.bodies[-1]["structured_outputs"] == {"grammar": lark}


def test_everything_about_sampling_is_said(fake: FakeVllm, engine: VllmEngine) -> None:
    sampling = Sampling(
        4,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        repetition_penalty=1.1,
        logit_bias={65: 2.0},
        seed=-1,
        stop=("x",),
        ignore_eos=True,
    )
    generate(engine, Request(PROMPT, sampling))
    assert fake.bodies[-1] == {
        "model": "base",
        "prompt": list(PROMPT),
        "max_tokens": 4,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.1,
        "logit_bias": {"65": 2.0},
        "seed": 2**63 - 1,
        "stop": ["x"],
        "stop_token_ids": [],
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    generate(engine, Request(PROMPT, GREEDY))
    assert fake.bodies[-1]["stop_token_ids"] == [0]


def test_cached_tokens_are_counted(engine: VllmEngine) -> None:
    prompt = tuple(1 + index % 200 for index in range(300))
    assert generate(engine, Request(prompt, GREEDY))[1].n_cached == 0
    again = generate(engine, Request(prompt, GREEDY))[1].n_cached
    assert again > 0
    stats = engine.stats()
    assert (stats.n_prompt, stats.n_cached) == (600, again)
