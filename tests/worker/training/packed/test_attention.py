"""Packed attention against one library call for each row, values and gradients."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from worker.training.packed import layout
from worker.training.packed.attend import ProductAttention
from worker.training.packed.attention import UnsupportedAttentionError, packed_attention
from worker.training.packed.layout import Layout

LENGTHS = [7, 6, 7, 3, 1]
Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def tensors(n_heads: int, n_keys: int, lengths: list[int]) -> Triple:
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int) -> torch.Tensor:
        return torch.randn(1, heads, sum(lengths), 8, generator=generator).requires_grad_()

    return draw(n_heads), draw(n_keys), draw(n_keys)


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], window: int | None = None
) -> torch.Tensor:
    parts, start = [], 0
    for n in lengths:
        i, j = torch.arange(n)[:, None], torch.arange(n)
        mask = (j <= i) & (i - j < (window or n))
        q_row, k_row, v_row = (each[:, :, start : start + n] for each in (q, k, v))
        parts.append(
            functional.scaled_dot_product_attention(
                q_row, k_row, v_row, attn_mask=mask, scale=0.3, enable_gqa=True
            )
        )
        start += n
    return torch.cat(parts, 2).transpose(1, 2)


def packed(inputs: Triple, lengths: list[int], **options: Any) -> torch.Tensor:
    with layout.active(Layout.of(lengths, "default")):
        output, weights = packed_attention(nn.Identity(), *inputs, None, scaling=0.3, **options)
    assert weights is None
    return output


@pytest.mark.parametrize(("n_heads", "n_keys"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("limit", [1024, 5], ids=["explicit", "kernel"])
def test_rows_attend_to_themselves_alone(
    n_heads: int, n_keys: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ProductAttention, "longest", limit)
    inputs, twins = tensors(n_heads, n_keys, LENGTHS), tensors(n_heads, n_keys, LENGTHS)
    found, expected = packed(inputs, LENGTHS), reference(*twins, LENGTHS)
    torch.testing.assert_close(found, expected)
    outer = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    found.backward(outer)
    expected.backward(outer)
    for one, other in zip(inputs, twins, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_a_window_is_kept() -> None:
    inputs = tensors(4, 2, LENGTHS)
    found = packed(inputs, LENGTHS, sliding_window=3)
    torch.testing.assert_close(found, reference(*inputs, LENGTHS, window=3))
    assert not torch.allclose(found, packed(inputs, LENGTHS))


def test_an_encoder_sees_both_ways() -> None:
    inputs = tensors(2, 2, [4])
    found = packed(inputs, [4], is_causal=False)
    expected = functional.scaled_dot_product_attention(*inputs, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(found, expected)


def test_dropout_drops_in_the_kernel() -> None:
    torch.manual_seed(0)
    inputs = tensors(2, 2, [6])
    assert not torch.allclose(packed(inputs, [6], dropout=0.5), packed(inputs, [6]))


@pytest.mark.parametrize("option", [{"softcap": 30.0}, {"s_aux": 1}])
def test_kinds_that_are_not_built_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedAttentionError, match=next(iter(option))):
        packed(tensors(2, 2, [3]), [3], **option)


def test_a_batch_of_several_rows_or_a_mask_is_refused() -> None:
    q, k, v = (each.repeat(2, 1, 1, 1) for each in tensors(2, 2, [3]))
    with pytest.raises(UnsupportedAttentionError):
        packed((q, k, v), [3])
    with layout.active(Layout.of([3], "x")), pytest.raises(UnsupportedAttentionError):
        packed_attention(nn.Identity(), *tensors(2, 2, [3]), torch.zeros(1))


def test_nothing_is_kept_that_grows_with_the_square_of_a_row() -> None:
    def kept_by(lengths: list[int]) -> int:
        sizes = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            packed(tensors(4, 2, lengths), lengths)
        return sum(sizes)

    assert kept_by([64]) == kept_by([32, 32])
