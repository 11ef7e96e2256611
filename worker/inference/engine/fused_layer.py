"""A Transformer layer of Llama's kind in a dozen calls, where it is a hundred in transformers.

A step of decoding is so little work that what it costs are its calls. A layer is taken over only
after it was tried: its parts have Llama's names, and on numbers it makes the same of them. It goes
through the same seams, ``cache.update`` and the attention of `row_attention`.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from worker.inference.engine.lora import AdaptedLinear
from worker.inference.engine.packed_linear import Joint, JointPart, PackedLinear
from worker.inference.engine.row_attention import NAME, attention
from worker.inference.engine.slots import Slots
from worker.inference.engine.wrapped import AdaptedLayer, AdaptedNorm
from worker.kernels.matrix import part
from worker.kernels.operators import add_and_rescale, gated, rescale, rotated
from worker.transformer_blocks import require_llama_parts

HEAD_NORMS = ("q_norm", "k_norm")
"""Of every head of queries and keys by itself, as in Qwen3."""
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-5}
"""How far, relatively, what it adds may be from what the layer itself does."""
_TRIED_TOKENS = 5

logger = logging.getLogger(__name__)


class _Products:
    """Linear layers that take the same numbers, and what the rows' adapters add to each."""

    def __init__(self, modules: Sequence[nn.Module], slots: Slots) -> None:
        self._slots = slots
        self._layers = layers = [each for each in modules if isinstance(each, AdaptedLinear)]
        if len(layers) < len(modules):
            raise ValueError("something else is in place of a linear layer")
        self._numbers = [slots.numbers[layer.path] for layer in layers]
        self._joint: Joint | None = None
        packed = self._packed()
        self._adds = all(each.adds for each in packed) if packed else False
        """Whether what adapters add goes into the sums of the products."""
        self._parts: list[tuple[int, ...]] = [
            (1, *part(0, each.out_features, number))
            for each, number in zip(packed, self._numbers, strict=False)
        ]

    def _packed(self) -> list[PackedLinear]:
        """Return the layers if all of them are packed."""
        packed = [each.base for each in self._layers if isinstance(each.base, PackedLinear)]
        return packed if len(packed) == len(self._layers) else []

    def join_(self) -> None:
        """Compute them as one product from now on, if they are packed."""
        packed = self._packed()
        if len(packed) < 2 or len({each.bias is None for each in packed}) > 1:
            return
        self._joint = Joint(packed)
        self._adds = self._joint.whole.adds
        told = zip(self._joint.starts, self._joint.sizes, self._numbers, strict=True)
        if self._adds:
            self._parts = [(len(packed), *(n for each in told for n in part(*each)))]
        for number, layer in enumerate(self._layers):
            layer.base = JointPart(self._joint, number, packed[number])

    def __call__(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        slots = self._slots
        outputs: Sequence[torch.Tensor]
        is_touched = slots.places is not None and any(slots.is_touched[n] for n in self._numbers)
        if self._joint is not None:
            added = (*slots.told, *self._parts[0]) if is_touched and self._adds else ()
            outputs = self._joint(x, added)
        elif is_touched and self._adds:
            pairs = zip(self._layers, self._parts, strict=True)
            outputs = [layer.base.forward(x, (*slots.told, *own)) for layer, own in pairs]
        else:
            outputs = [layer.base.forward(x) for layer in self._layers]
        if is_touched and not self._adds:
            paths = [layer.path for layer in self._layers]
            slots.add_(list(zip(outputs, paths, strict=True)), x)
        return outputs


class FusedLayer:
    """What `layer` makes of the hidden states, for adapters that only add products of low rank.

    Raises:
        ValueError: it is not of Llama's kind; the message says why.
    """

    def __init__(self, layer: nn.Module, slots: Slots) -> None:
        require_llama_parts(layer, also=HEAD_NORMS)
        module: Any = layer
        self._attention: Any = module.self_attn
        if self._attention.config._attn_implementation != NAME:
            raise ValueError("its attention is another")
        mlp = module.mlp
        self._heads = _Products(
            [self._attention.q_proj, self._attention.k_proj, self._attention.v_proj], slots
        )
        self._output = _Products([self._attention.o_proj], slots)
        self._gates = _Products([mlp.gate_proj, mlp.up_proj], slots)
        self._down = _Products([mlp.down_proj], slots)
        self._before, self._between = (
            _norm(each) for each in (module.input_layernorm, module.post_attention_layernorm)
        )
        self._head_norms = [
            _norm(getattr(self._attention, name))
            for name in HEAD_NORMS
            if hasattr(self._attention, name)
        ]
        self._index: int = self._attention.layer_idx
        self._scale: float = self._attention.scaling

    def __call__(
        self,
        x: torch.Tensor,
        turns: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
        cache: Any,
    ) -> torch.Tensor:
        """Map hidden states [rows, tokens, d] to such.

        Args:
            x: The hidden states.
            turns: Cosines and sines of the tokens' positions.
            mask: What to add to scores, as the layer takes it.
            cache: Where keys and values are put, or None.
        """
        projected = list(self._heads(rescale(x, *self._before)))
        for number, (weight, epsilon) in enumerate(self._head_norms):
            heads = projected[number].unflatten(-1, (-1, len(weight)))
            projected[number] = rescale(heads, weight, epsilon).flatten(-2)
        query, keys, values = rotated(projected, *turns)
        if cache is not None:
            keys, values = cache.update(keys, values, self._index)
        found, _ = attention(self._attention, query, keys, values, mask, scaling=self._scale)
        (found,) = self._output(found.reshape(*x.shape[:-1], -1))
        x, normal = add_and_rescale(x, found, *self._between)
        gate, value = self._gates(normal)
        (found,) = self._down(gated(gate, value))
        return x + found

    def join_(self) -> None:
        """Compute the products of the same numbers as one, where they are packed."""
        self._heads.join_()
        self._gates.join_()


def _norm(norm: nn.Module) -> tuple[torch.Tensor, float]:
    if not isinstance(norm, AdaptedNorm) or norm.epsilon is None:
        raise ValueError("its norm is another")
    weight: torch.Tensor = norm.base.get_parameter("weight")
    return weight, norm.epsilon


@torch.inference_mode()
def fuse_(layers: Sequence[AdaptedLayer], slots: Slots) -> int:
    """Let each of `layers` that can be go through a `FusedLayer`; return how many do."""
    n_fused, reasons = 0, set()
    for layer in layers:
        try:
            fused = FusedLayer(layer.base, slots)
            _try(layer.base, fused)
        except ValueError as error:
            reasons.add(str(error))
            continue
        fused.join_()
        layer.fused = fused
        n_fused += 1
    for reason in sorted(reasons):
        logger.info("Layers go through transformers call by call: %s.", reason)
    return n_fused


def _try(layer: nn.Module, fused: FusedLayer) -> None:
    """Compare both on numbers.

    Raises:
        ValueError: they differ.
    """
    attention: Any = layer.get_submodule("self_attn")
    draw = torch.Generator().manual_seed(0)
    weight = layer.get_submodule("input_layernorm").get_parameter("base.weight")
    x = torch.randn(2, _TRIED_TOKENS, len(weight), generator=draw).to(weight.dtype)
    angles = torch.rand(1, _TRIED_TOKENS, attention.head_dim // 2, generator=draw) * 6
    angles = torch.cat((angles, angles), -1)
    turns = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    expected = layer(x, attention_mask=None, position_embeddings=turns)
    if not isinstance(expected, torch.Tensor):
        raise ValueError("it returns more than hidden states")
    found = fused(x, turns, None, None)
    # In float64: what a layer adds may be small beside what it is added to.
    exact, own = expected.double() - x, found.double() - x
    error = float((own - exact).norm() / exact.norm())
    if not error <= TOLERANCE[x.dtype]:
        raise ValueError(f"tried on numbers, it differs by {error:.1e}")
