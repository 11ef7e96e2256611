"""Packed and padded passes give the same on every family, or padded is taken and says so."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from models.domain.training import Precision
from tests.worker.training.tiny import SIZES, attach, lora, make_examples
from worker.training.forward import PackedForward, PaddedForward, choose_forward, label_logits
from worker.training.objectives.base import IGNORED, Batch, Example, LanguageForward
from worker.training.objectives.sft import Sft
from worker.training.packed import attend

FP32 = Precision(type="fp32")
ALONE = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
GPT2 = GPT2Config(vocab_size=97, n_positions=128, n_embd=32, n_layer=2, n_head=4)
FAMILIES: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "llama with biases": (
        LlamaForCausalLM,
        LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    ),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=8)),
    "gemma": (GemmaForCausalLM, GemmaConfig(**SIZES, head_dim=8)),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=None)),
    "mistral with a window": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=6)),
    "phi": (PhiForCausalLM, PhiConfig(**SIZES)),
    "phi3": (Phi3ForCausalLM, Phi3Config(**SIZES)),
    "gpt-neox": (GPTNeoXForCausalLM, GPTNeoXConfig(**ALONE)),
    "cohere": (CohereForCausalLM, CohereConfig(**SIZES)),
    "mixtral": (
        MixtralForCausalLM,
        MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    ),
}
UNPACKABLE: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "bloom": (
        BloomForCausalLM,
        BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4),
    ),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.5)),
}


def build(family: tuple[type[PreTrainedModel], Any], **peft: Any) -> PeftModel:
    """The same model each time: random weights, and adapters that do something."""
    model_class, config = family
    torch.manual_seed(0)
    adapted = attach(model_class(config).eval(), lora(**peft))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return adapted


def assert_alike(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for rounding, which one large element must not hide in the small ones."""
    assert (found - expected).norm() <= 1e-4 * expected.norm() + 1e-7


def make_batch(n_rows: int = 6) -> Batch:
    return Sft().collate(make_examples(n_rows), "cpu")


def step(model: PeftModel, forward: LanguageForward) -> tuple[float, int, dict[str, torch.Tensor]]:
    model.zero_grad()
    sums = forward.cross_entropy(make_batch())
    sums.loss.backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return float(sums.loss.detach()), int(sums.n_correct), gradients


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_packed_rows_give_the_loss_and_the_gradients_of_padded_ones(family: Any) -> None:
    own = build(family)
    expected = step(own, PaddedForward(own, FP32, "cpu", 0))
    model = build(family)
    packed, reason = choose_forward(model, FP32, "cpu", 0, cache_weights=False)
    assert reason is None
    assert isinstance(packed, PackedForward)
    loss, n_correct, gradients = step(model, packed)
    assert loss == pytest.approx(expected[0], rel=1e-5)
    assert n_correct == expected[1]
    assert gradients.keys() == expected[2].keys()
    for name, gradient in gradients.items():
        assert_alike(gradient, expected[2][name])


@pytest.mark.parametrize("sizes", [[1] * 8, [2] * 4, [4, 4]], ids=["1x8", "2x4", "4x2"])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_a_step_is_the_same_in_one_part_or_in_several(family: Any, sizes: list[int]) -> None:
    model = build(family)
    packed, _ = choose_forward(model, FP32, "cpu", 0, cache_weights=False)
    examples = make_examples(8)

    def gradients(parts: list[list[Example]]) -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        n_trained = sum(example.n_trained for example in examples)
        loss = 0.0
        for part in parts:
            sums = packed.cross_entropy(Sft().collate(part, "cpu"))
            (sums.loss / n_trained).backward()
            loss += float(sums.loss.detach()) / n_trained
        named = model.named_parameters()
        return loss, {name: p.grad.clone() for name, p in named if p.grad is not None}

    whole_loss, whole = gradients([examples])
    remaining = iter(examples)
    loss, found = gradients([[next(remaining) for _ in range(size)] for size in sizes])
    assert loss == pytest.approx(whole_loss, rel=1e-5)
    for name, gradient in found.items():
        assert_alike(gradient, whole[name])


@pytest.mark.parametrize("family", UNPACKABLE.values(), ids=UNPACKABLE.keys())
def test_a_model_that_cannot_be_packed_keeps_its_own_pass_and_says_why(family: Any) -> None:
    model = build(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    own_attention = model.get_base_model().config._attn_implementation  # type: ignore[union-attr]
    forward, reason = choose_forward(model, FP32, "cpu", 0, cache_weights=False)
    assert reason
    assert isinstance(forward, PaddedForward)
    assert model.get_base_model().config._attn_implementation == own_attention  # type: ignore[union-attr]
    other = build(family)
    expected = step(other, PaddedForward(other, FP32, "cpu", 0))
    found = step(model, forward)
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_gpt2_with_its_conv1d_layers_is_packed_around_pefts_own_adapters() -> None:
    config = GPT2Config(
        **{**GPT2.to_dict(), "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    )
    lora_config = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=["c_attn", "c_proj"],
        fan_in_fan_out=True,
        init_lora_weights=False,
    )

    def build_gpt2() -> PeftModel:
        torch.manual_seed(0)
        adapted = get_peft_model(GPT2LMHeadModel(config).eval(), lora_config)
        assert isinstance(adapted, PeftModel)
        return adapted

    own, model = build_gpt2(), build_gpt2()
    expected = step(own, PaddedForward(own, FP32, "cpu", 0))
    packed, reason = choose_forward(model, FP32, "cpu", 0, cache_weights=False)
    assert reason is None
    found = step(model, packed)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    for name, gradient in found[2].items():
        assert_alike(gradient, expected[2][name])


def test_outside_of_a_packed_pass_the_model_is_its_own() -> None:
    family = FAMILIES["llama"]
    own, model = build(family), build(family)
    choose_forward(model, FP32, "cpu", 0, cache_weights=False)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    with torch.no_grad():
        expected = own(input_ids=ids, attention_mask=mask).logits
        found = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        texts = [each.generate(ids[:1], max_new_tokens=8, do_sample=False) for each in (own, model)]
    assert torch.equal(*texts)


def test_choosing_changes_no_bit_of_the_weights() -> None:
    model = build(FAMILIES["llama"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    choose_forward(model, FP32, "cpu", 0, cache_weights=False)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_wrong_packed_pass_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    # Rows see the future.
    monkeypatch.setattr(attend, "causal_softmax_", lambda scores: scores.softmax(-1))
    forward, reason = choose_forward(build(FAMILIES["llama"]), FP32, "cpu", 0, cache_weights=False)
    assert isinstance(forward, PaddedForward)
    assert reason is not None
    assert "differ" in reason


def test_logits_are_computed_for_labels_only_and_equal_the_full_ones() -> None:
    model = build(FAMILIES["llama"])
    ids = torch.randint(97, (2, 7), generator=torch.Generator().manual_seed(0))
    wanted = torch.zeros(2, 7, dtype=torch.bool)
    wanted[0, 2:4] = wanted[1, 5] = True
    few = label_logits(model, wanted, input_ids=ids)
    assert few.shape == (3, 97)
    torch.testing.assert_close(few, model(input_ids=ids).logits[wanted], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gemma2", "cohere"])
def test_what_a_model_does_to_its_logits_after_the_head_is_kept(name: str) -> None:
    family = (FAMILIES | UNPACKABLE)[name]
    model = build(family)
    forward, _ = choose_forward(model, FP32, "cpu", 0, cache_weights=False)
    model.eval()
    batch = make_batch(1)
    wanted = batch.targets != IGNORED
    logits = model(input_ids=batch.input_ids[None]).logits[0][wanted]
    expected = torch.nn.functional.cross_entropy(logits, batch.targets[wanted], reduction="sum")
    assert float(forward.cross_entropy(batch).loss.detach()) == pytest.approx(
        float(expected.detach()), rel=1e-5
    )


def test_the_head_keeps_no_hook_after_a_failure() -> None:
    model = build(FAMILIES["llama"])
    head: Any = model.get_base_model().get_output_embeddings()  # type: ignore[operator]
    with pytest.raises(IndexError):
        label_logits(model, torch.ones(1, 1, dtype=torch.bool), input_ids=torch.tensor([[10_000]]))
    assert not head._forward_pre_hooks
