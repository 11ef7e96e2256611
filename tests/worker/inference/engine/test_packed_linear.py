"""Packed weights: the same numbers as a plain layer's, for any number of rows."""

from typing import Any

import pytest
import torch
from torch import nn

from tests.worker.inference.tiny import tiny_llama
from worker.inference.engine.packed_linear import PackedLinear, is_supported, pack_

pytestmark = pytest.mark.skipif(
    not is_supported(), reason="oneDNN packs no weights in bfloat16 for this processor"
)


@pytest.mark.parametrize(("n_in", "n_out"), [(64, 96), (5, 7), (33, 160)])
@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_products_are_those_of_the_plain_layer(n_in: int, n_out: int, *, bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(n_in, n_out, bias=bias, dtype=torch.bfloat16)
    packed = PackedLinear(plain)
    assert torch.equal(packed.weight, plain.weight)
    for shape in [(1, n_in), (8, 1, n_in), (2, 87, n_in), (0, n_in)]:
        x = torch.randn(shape).bfloat16()
        torch.testing.assert_close(packed(x), plain(x))
    columns = torch.randn(4, n_in, 6).bfloat16().transpose(1, 2)  # not contiguous
    # The plain layer rounds once more here before it adds the bias.
    torch.testing.assert_close(packed(columns), plain(columns), rtol=2**-6, atol=2**-6)


@torch.inference_mode()
def test_a_model_answers_as_before_and_a_tied_head_keeps_its_own_weights() -> None:
    model: Any = tiny_llama(tie_word_embeddings=True)
    model.to(torch.bfloat16)
    ids = torch.randint(0, 256, (2, 9))
    expected = model(ids).logits
    assert pack_(model) == 15
    torch.testing.assert_close(model(ids).logits, expected)
    model.get_input_embeddings().weight.zero_()
    assert torch.count_nonzero(model.lm_head.weight)


@torch.inference_mode()
def test_layers_in_float32_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.bfloat16))
    assert pack_(model) == 1
    assert type(model[0]) is nn.Linear
