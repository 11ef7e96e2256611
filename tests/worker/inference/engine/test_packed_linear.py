"""Packed weights: the same numbers as a plain layer's, for any number of rows."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from tests.worker.inference.tiny import tiny_llama
from worker.inference.engine.packed_linear import (
    Joint,
    JointPart,
    PackedLinear,
    is_supported,
    pack_,
    settle_,
)

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
def test_weights_that_have_settled_are_the_same() -> None:
    torch.manual_seed(0)
    plain = [nn.Linear(32, n, dtype=torch.bfloat16) for n in (48, 16, 24)]
    packed = [PackedLinear(each) for each in plain]
    joint = Joint(packed[:2])
    model = nn.Sequential(*(JointPart(joint, n, packed[n]) for n in range(2)), packed[2])
    settle_(model)
    for settled, own in zip(model, plain, strict=True):
        assert isinstance(settled, PackedLinear)
        assert torch.equal(settled.weight, own.weight)


@torch.inference_mode()
def test_layers_in_float32_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.bfloat16))
    assert pack_(model) == 1
    assert type(model[0]) is nn.Linear


@torch.inference_mode()
@pytest.mark.parametrize("bias", [False, True])
def test_joint_layers_give_each_what_it_had_alone_asked_for_together_or_one_by_one(
    *, bias: bool
) -> None:
    torch.manual_seed(0)
    plain = [nn.Linear(32, n, bias=bias, dtype=torch.bfloat16) for n in (48, 16, 24)]
    packed = [PackedLinear(each) for each in plain]
    joint = Joint(packed)
    parts = [JointPart(joint, number, each) for number, each in enumerate(packed)]
    for each, part in zip(plain, parts, strict=True):
        assert torch.equal(part.weight, each.weight)
    x, other = torch.randn(2, 3, 5, 32).bfloat16()
    for found, each in zip(joint(x), plain, strict=True):
        torch.testing.assert_close(found, each(x))
    torch.testing.assert_close(parts[1](x), plain[1](x))
    torch.testing.assert_close(parts[1](other), plain[1](other))
    torch.testing.assert_close(parts[0](other), plain[0](other))
    torch.testing.assert_close(parts[2](x), plain[2](x))
    torch.testing.assert_close(parts[2](x), plain[2](x))


@torch.inference_mode()
def test_one_by_one_joint_layers_multiply_once_and_keep_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packed = [PackedLinear(nn.Linear(8, 8, dtype=torch.bfloat16)) for _ in range(3)]
    joint = Joint(packed)
    calls: list[torch.Tensor] = []
    forward = joint.whole.forward

    def counted(x: torch.Tensor, added: Sequence[int] = ()) -> torch.Tensor:
        calls.append(x)
        return forward(x, added)

    monkeypatch.setattr(joint.whole, "forward", counted)
    x = torch.ones(1, 8).bfloat16()
    for number in range(3):
        joint.part(x, number)
    assert len(calls) == 1
    assert joint._input is None
    assert not joint._outputs
