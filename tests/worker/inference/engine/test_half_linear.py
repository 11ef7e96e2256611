"""Weights in float16: the numbers of a bfloat16 base stay what they are."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from worker.inference.engine.half_linear import HalfLinear, hold_in_half_


def linear(weight: torch.Tensor, *, bias: bool = False) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
    made.weight = nn.Parameter(weight)
    return made


@pytest.mark.parametrize("scale", [1e-6, 1e-2, 1.0, 300.0, 1e6])
@torch.inference_mode()
def test_weights_that_were_bfloat16_are_multiplied_as_they_were(scale: float) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(96, 64) * scale).bfloat16().float()
    half = HalfLinear(linear(weight))
    assert torch.equal(half.weight, weight)
    x = torch.randn(3, 5, 64)
    torch.testing.assert_close(half(x), x @ weight.T, rtol=1e-5, atol=1e-5 * scale)


@torch.inference_mode()
def test_other_weights_keep_eleven_bits() -> None:
    torch.manual_seed(0)
    weight = torch.randn(96, 64)
    half = HalfLinear(linear(weight))
    assert not torch.equal(half.weight, weight)
    torch.testing.assert_close(half.weight, weight, rtol=2**-11, atol=2**-26)


@torch.inference_mode()
def test_a_weight_far_below_the_largest_loses_no_more_than_a_sum_does() -> None:
    weight = torch.tensor([[1.0, 2.0**-20, 2.0**-30, 2.0**-40, 0.0]]).bfloat16().float()
    found = HalfLinear(linear(weight)).weight
    assert torch.equal(found[0, :3], weight[0, :3])
    assert (found - weight).abs().max() <= 2**-32


@torch.inference_mode()
def test_a_bias_is_added_and_a_layer_of_zeros_stays_zero() -> None:
    torch.manual_seed(0)
    given = linear(torch.randn(8, 4).bfloat16().float() / 1000, bias=True)
    half = HalfLinear(given)
    x = torch.randn(2, 4)
    torch.testing.assert_close(half(x), given(x))
    assert torch.equal(half.bias, given.bias)
    assert torch.equal(HalfLinear(linear(torch.zeros(3, 4)))(x), torch.zeros(2, 3))


@torch.inference_mode()
def test_rows_depend_on_their_company_by_no_more_than_rounding() -> None:
    torch.manual_seed(0)
    half = HalfLinear(linear(torch.randn(96, 64).bfloat16().float()))
    x = torch.randn(33, 64)
    together = half(x)
    for row in range(33):
        torch.testing.assert_close(half(x[row : row + 1])[0], together[row], rtol=0, atol=1e-5)


@torch.inference_mode()
def test_a_model_answers_as_before_and_its_embedding_stays() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    ids = torch.arange(40).reshape(2, 20)
    before = model(ids).logits
    assert hold_in_half_(model) == 2 * 7 + 1
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)
    assert isinstance(model.get_output_embeddings(), HalfLinear)
    assert [name for name, _ in model.named_parameters() if "proj" in name] == []
