"""LoRA on linear layers that read the same input, as one node of the graph.

For each layer ``y = W x + b + s · B A dropout(x)`` (arXiv 2106.09685, equation 3). Compared with
the same in separate modules: no gradient of W or b is ever formed, only x and A x are kept for the
backward pass, and where x needs no gradient (below the first adapter) none is computed. The rows of
a batch may belong to different adapters.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from worker.training.dropout import Drop, draw_seed
from worker.training.packed import layout, pool
from worker.training.packed.between import operators_of
from worker.training.packed.frozen import FrozenWeight
from worker.training.packed.matrices import Matrices, Pair
from worker.training.packed.products import Part
from worker.training.packed.ways import products_of


class LinearGroup:
    """Layers with one input: their frozen weights, and the pairs of each adapter by its name.

    Args:
        weights: Of each layer.
        pairs: Those of the same layers, by adapter.
        matrices: To which theirs are added: those of the model, which are cast together.
    """

    def __init__(
        self,
        weights: list[FrozenWeight],
        pairs: Mapping[str, Sequence[Pair | None]],
        matrices: Matrices | None = None,
    ) -> None:
        self.weights = weights
        self.outputs = [weight.outputs for weight in weights]
        self.pairs = pairs
        self._matrices = Matrices() if matrices is None else matrices
        self._columns = self._matrices.add(self.outputs, pairs)

    def __call__(self, x: torch.Tensor, *, training: bool) -> torch.Tensor:
        """Return [..., all outputs] for x [..., inputs] under the active layout."""
        parts, parameters = self.parts(x, training=training)
        output: torch.Tensor = _Product.apply(x, self.weights, parts, *parameters)
        return output

    def gated(self, both: torch.Tensor, *, training: bool) -> torch.Tensor:
        """Return the products of ``silu(gate) · up`` for both [..., 2 · inputs], side by side.

        The gated feed-forward of arXiv 2002.05202. Its activation is made again in the backward
        pass instead of being kept.
        """
        parts, parameters = self.parts(both, training=training)
        output: torch.Tensor = _GatedProduct.apply(both, self.weights, parts, *parameters)
        return output

    def parts(self, like: torch.Tensor, *, training: bool) -> tuple[list[Part], list[Any]]:
        """Return what each segment is multiplied with, and the parameters behind it."""
        parts, parameters = [], []
        for segment in layout.current().segments:
            columns = self._columns.get(segment.adapter)  # others may have matrices here
            if columns is None:
                continue
            matrices = self._matrices.cast(segment.adapter, like, training=training)
            drop = None
            if training and columns.drops:
                shape = (segment.end - segment.start, self.weights[0].inputs)
                drop = Drop(columns.rates, *shape, draw_seed(segment.generator), like.device)
            parts.append(Part(segment.start, segment.end, columns, matrices, drop, training))
            parameters += columns.parameters
        return parts, parameters


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weights: list[FrozenWeight], parts: list[Part], *_: Any
    ) -> torch.Tensor:
        flat = x.reshape(-1, weights[0].inputs)
        output, kept = products_of(x).multiply(flat, weights, parts)
        ctx.save_for_backward(flat, *kept)
        ctx.weights, ctx.parts, ctx.shape = weights, parts, x.shape
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        flat, *kept = ctx.saved_tensors
        gradient = gradient.reshape(-1, gradient.shape[-1]).contiguous()
        wanted = ctx.needs_input_grad[0]
        how = products_of(flat)
        to_x, sent = how.send_back(gradient, ctx.weights, ctx.parts, kept, wanted=wanted)
        gradients = how.matrix_gradients(flat, ctx.parts, sent)
        return (to_x.view(ctx.shape) if to_x is not None else None, None, None, *gradients)


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, both: torch.Tensor, weights: list[FrozenWeight], parts: list[Part], *_: Any
    ) -> torch.Tensor:
        flat = both.reshape(-1, both.shape[-1])
        output, kept = products_of(flat).multiply(gate(flat), weights, parts)
        ctx.save_for_backward(flat, *kept)
        ctx.weights, ctx.parts, ctx.shape = weights, parts, both.shape
        return output.view(*both.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        flat, *kept = ctx.saved_tensors
        gradient = gradient.reshape(-1, gradient.shape[-1]).contiguous()
        how = products_of(flat)
        to_product, sent = how.send_back(gradient, ctx.weights, ctx.parts, kept)
        assert to_product is not None
        to_both, product = gate_back(to_product, flat)
        gradients = how.matrix_gradients(product, ctx.parts, sent)
        return to_both.view(ctx.shape), None, None, *gradients


def gate(both: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) · up [T, inputs] of both, [T, 2 · inputs], side by side."""
    first, up = both.chunk(2, -1)
    if (own := operators_of(both)) is not None:
        return own.gated(first, up, out=pool.empty(first, *first.shape))
    return _silu(first).mul_(up)


def gate_back(gradient: torch.Tensor, both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradient of both, and `gate` of them once more; `gradient` is used up."""
    to_both = pool.empty(both, *both.shape)
    product = pool.empty(gradient, *gradient.shape)
    if (own := operators_of(both)) is not None:
        own.gated_back(gradient, both, out=(to_both, product))
        return to_both, product
    first, up = both.chunk(2, -1)
    to_first, to_up = to_both.chunk(2, -1)
    active = _silu(first)
    torch.mul(active, up, out=product)
    torch.mul(gradient, active, out=to_up)
    torch.ops.aten.silu_backward.grad_input(gradient.mul_(up), first, grad_input=to_first)
    return to_both, product


def _silu(x: torch.Tensor) -> torch.Tensor:
    """Return the contiguous silu(x)."""
    active: torch.Tensor = torch.ops.aten.silu.out(x, out=pool.empty(x, *x.shape))
    return active
