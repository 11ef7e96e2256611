"""Rotary embedding as one node against the library's function."""

import types

import pytest
import torch
from torch import nn
from transformers.models.llama import modeling_llama

from worker.training.packed import layout, rope
from worker.training.packed.layout import Layout


def angles(n: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    half = torch.randn(1, n, width // 2, generator=torch.Generator().manual_seed(1)).double()
    both = torch.cat([half, half], -1)
    return both.cos(), both.sin()


def test_the_gradient_is_the_rotation_back() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (
        torch.randn(1, heads, 3, 4, generator=generator).double().requires_grad_()
        for heads in (2, 1)
    )
    cos, sin = (each.unsqueeze(1) for each in angles(3, 4))
    assert torch.autograd.gradcheck(
        lambda q, k: rope._Rotation.apply(q, k, cos, sin), (q, k), eps=1e-6
    )


def test_the_wrapper_gives_what_the_function_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    own = modeling_llama.apply_rotary_pos_emb
    while isinstance(own, rope._Wrapper):
        own = own._own
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", own)
    model = nn.Module()
    monkeypatch.setattr(type(model), "__module__", modeling_llama.__name__)
    assert rope.install(model)
    wrapper = modeling_llama.apply_rotary_pos_emb
    assert rope.install(model)
    assert modeling_llama.apply_rotary_pos_emb is wrapper, "it is wrapped once"
    q, k = torch.randn(1, 4, 5, 8).double(), torch.randn(1, 2, 5, 8).double()
    cos, sin = angles(5, 8)
    expected = own(q, k, cos, sin)
    for found in (wrapper(q, k, cos, sin), _inside(wrapper, q, k, cos, sin)):
        torch.testing.assert_close(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1])


def _inside(function: object, *args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    assert callable(function)
    with layout.active(Layout.of([5], "default")):
        pair: tuple[torch.Tensor, torch.Tensor] = function(*args)
    return pair


@pytest.mark.parametrize(
    "other",
    [
        lambda q, k, cos, sin: (q, k),
        lambda q, cos, sin: q,
        lambda q, k, cos, sin: (q * cos.unsqueeze(2), k),
    ],
    ids=["another rotation", "another signature", "other shapes"],
)
def test_another_function_is_left_alone(other: object, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("other_model")
    module.apply_rotary_pos_emb = other  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "other_model", module)
    kind = type("Other", (nn.Module,), {"__module__": "other_model"})
    assert not rope.install(kind())
    assert module.apply_rotary_pos_emb is other
