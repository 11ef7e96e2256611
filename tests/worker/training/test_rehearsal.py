"""A rehearsal: an adapter that is drawn again, a pass that is counted, a base that comes back."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from models.domain.training import Precision
from tests.worker.training.tiny import tiny_llama
from worker.training import memory, methods
from worker.training.memory import PassMemory
from worker.training.model import adapt, load_base, trainable_parameters
from worker.training.rehearsal import Rehearsed, rehearse


def small_llama(dtype: torch.dtype) -> LlamaForCausalLM:
    model = tiny_llama(dtype=dtype)
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize(("kind", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_adapter_is_that_of_a_fresh_one(kind: str, dtype: torch.dtype) -> None:
    peft = {"type": "lora", "r": 4, "init": "gaussian" if kind == "fp32" else "default"}
    precision = Precision.model_validate({"type": kind})
    ready = rehearse(small_llama(dtype), precision, peft, "cpu", 0)
    assert isinstance(ready, Rehearsed)
    state = torch.get_rng_state()
    ready.draw(5)
    assert torch.equal(state, torch.get_rng_state())
    lora = methods.get_method("lora")
    fresh = adapt(small_llama(dtype), lora, methods.parse_params(peft), 5)
    expected = trainable_parameters(fresh)
    for name, parameter in trainable_parameters(ready.model).items():
        assert torch.equal(parameter, expected[name])
        assert parameter.grad is None
    assert ready.memory.n_tokens > ready.memory.longest
    assert ready.memory.n_bytes > 1000


def test_the_adapter_on_four_bits_is_that_of_a_fresh_one(tiny_base: Path) -> None:
    peft, precision = {"type": "lora", "r": 4}, Precision(type="nf4")
    ready = rehearse(load_base(tiny_base, precision, "cpu"), precision, peft, "cpu", 0)
    assert isinstance(ready, Rehearsed)
    ready.draw(5)
    lora = methods.get_method("lora")
    base = load_base(tiny_base, precision, "cpu")
    expected = trainable_parameters(adapt(base, lora, methods.parse_params(peft), 5))
    for name, parameter in trainable_parameters(ready.model).items():
        assert torch.equal(parameter, expected[name])


def test_the_base_comes_back_as_it_was() -> None:
    base = small_llama(torch.float32)
    peft, precision = {"type": "lora", "r": 4}, Precision(type="fp32")
    ready = rehearse(base, precision, peft, "cpu", 0)
    assert isinstance(ready, Rehearsed)
    stripped = ready.strip()
    assert [name for name, _ in stripped.named_parameters()] == [
        name for name, _ in small_llama(torch.float32).named_parameters()
    ]
    assert stripped.config._attn_implementation == "eager"
    assert not any("forward" in vars(module) for module in stripped.modules())
    again = rehearse(stripped, precision, {**peft, "r": 2}, "cpu", 0)
    assert isinstance(again, Rehearsed)


def test_room_is_reckoned_from_tokens_and_the_longest_row(monkeypatch: pytest.MonkeyPatch) -> None:
    known = PassMemory(n_tokens=100, longest=50, n_bytes=10)
    monkeypatch.setattr(memory, "free_bytes", lambda _: 160)
    assert known.leaves_room_for([10], "cpu")
    assert known.leaves_room_for([50] * 16, "cpu")
    assert not known.leaves_room_for([50] * 17, "cpu")
    assert known.leaves_room_for([100] * 4, "cpu")
    assert not known.leaves_room_for([101] * 4, "cpu")
