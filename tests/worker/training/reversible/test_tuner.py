"""MEFT on models: exact on every family, beside other adapters, stored and read by PEFT."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from tests.worker.training.tiny import SIZES
from worker.training.reversible.streams import NotReversibleError
from worker.training.reversible.tuner import KINDS, MeftConfig, MeftModel, Stack, stack_of

DECODERS = ("gemma3_text", "gpt2", "gpt_neox", "llama", "phi", "qwen3")
ENCODERS = ("bert", "deberta-v2", "distilbert", "modernbert", "roberta")
IDS = torch.arange(3, 15)[None].repeat(2, 1)

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def tiny(family: str) -> Any:
    torch.manual_seed(0)
    ids = {"cls_token_id": 1, "sep_token_id": 2} if family == "modernbert" else {}
    config = AutoConfig.for_model(family, **SIZES, **ids, initializer_range=0.2)
    kind = AutoModelForCausalLM if family in DECODERS else AutoModelForMaskedLM
    return kind.from_config(config, dtype=torch.float32).eval().requires_grad_(False)


def adapted(family: str, variant: str = "meft1", **others: Any) -> tuple[Any, Stack]:
    config = MeftConfig(variant=variant, r=4, **others)
    model = get_peft_model(tiny(family), config)
    return model, stack_of(model)


def logits(model: Any) -> torch.Tensor:
    options = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    found: torch.Tensor = model(input_ids=IDS, **options).logits
    return found


def gradients(model: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    model.zero_grad()
    found = logits(model.train())
    torch.nn.functional.cross_entropy(found.flatten(0, 1), IDS.flatten()).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("variant", KINDS)
@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS])
def test_every_family_comes_back_bit_for_bit(family: str, variant: str) -> None:
    """Dropout included; the gradients are those of layers whose inputs are kept."""
    if variant == "meft3" and family in ("gpt_neox", "phi"):
        pytest.skip("refused: tests/worker/training/reversible/test_blocks.py")
    model, stack = adapted(family, variant, dropout=0.1)
    stack.keeps_history = True
    found = gradients(model)
    assert stack.last_plan is not None
    assert stack.last_plan.n_mismatches == 0
    assert all(each.any() for each in found.values())
    stack.keeps_inputs = True
    expected = gradients(model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("variant", KINDS)
def test_the_start_is_near_the_base_and_off_means_the_base(variant: str) -> None:
    base = logits(tiny("llama")).detach()
    model, _ = adapted("llama", variant)
    with torch.no_grad():
        found = logits(model.eval())
        with model.disable_adapter():
            assert torch.equal(logits(model), base)
    assert 0 < float((found - base).norm() / base.norm()) < 0.03


def test_what_is_stored_gives_the_same_logits_when_peft_reads_it(tmp_path: Path) -> None:
    model, _ = adapted("llama", "meft1", dropout=0.1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
        expected = logits(model.eval())
        model.save_pretrained(str(tmp_path))
        names = set(load_file(tmp_path / "adapter_model.safetensors"))
        assert "base_model.model.model.layers.1.meft_feed_forward.down.weight" in names
        loaded = PeftModel.from_pretrained(tiny("llama"), str(tmp_path))
        assert torch.equal(logits(loaded.eval()), expected)
        assert isinstance(loaded.base_model, MeftModel)


def test_adapters_of_one_base_stay_apart() -> None:
    model, stack = adapted("llama")
    first = logits(model.eval()).detach()
    model.add_adapter("other", MeftConfig(variant="meft3", lambda_bits=3, r=2))
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    assert not torch.allclose(logits(model), first, atol=1e-3)
    assert set(gradients(model)) == {
        name for name, _ in model.named_parameters() if ".other." in name
    }
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(logits(model.eval()), first)
    assert len(stack.layers) == 2


def test_it_cannot_be_merged_but_taken_off() -> None:
    model, _ = adapted("gpt2")
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_and_unload()
    assert torch.equal(logits(model.unload()), logits(tiny("gpt2")))


def test_generation_with_a_cache_is_generation_without() -> None:
    model, _ = adapted("llama")
    prompt = IDS[:1, :4]
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        cached = model.eval().generate(input_ids=prompt, **options)
        assert torch.equal(model.generate(input_ids=prompt, use_cache=False, **options), cached)


def test_training_with_a_cache_is_refused() -> None:
    model, _ = adapted("llama")
    with pytest.raises(RuntimeError, match="use_cache=False"):
        model.train()(input_ids=IDS, use_cache=True)


def test_a_layer_that_does_not_repeat_itself_fails_the_step() -> None:
    model, stack = adapted("llama")
    norm: Any = stack.layers[1].base_layer.input_layernorm
    norm.register_forward_hook(lambda _, args, output: output + torch.rand(1).item())
    torch.manual_seed(0)
    gradients(model)  # what is drawn from the generator is repeated
    calls = iter(range(9))
    norm.register_forward_hook(lambda _, args, output: output + next(calls))
    with pytest.raises(NotReversibleError):
        gradients(model)


@pytest.mark.parametrize("given", [{"variant": "meft4"}, {"activation": "eval"}])
def test_a_file_with_unknown_words_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(given.values()))):
        MeftConfig(**given)
