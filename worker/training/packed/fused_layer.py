"""A Transformer layer of Llama's kind as one node of the graph.

Between its products stand loops or kernels of our own (`between`) where transformers has a hundred
operations, each of which goes through memory, and often through new pages of it. It computes and
keeps what the packed modules would. A layer is taken over only after it was tried on numbers.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from worker.kernels.training import Turns
from worker.training.packed import layout, pool
from worker.training.packed.between import Operators, operators_of
from worker.training.packed.flash import FlashAttention
from worker.training.packed.layout import Layout
from worker.training.packed.lora import LinearGroup, gate, gate_back
from worker.training.packed.norm import can_divide
from worker.training.packed.products import Part
from worker.training.packed.ways import attention_of, products_of
from worker.transformer_blocks import UnknownLayersError, require_llama_parts

PRODUCTS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
TRIED_TOKENS = [5, 3]
ROUNDINGS = 4.0
"""How many times what one rounding of its input changes in a layer its own roundings may."""
_CALLS_RUN_AGAIN = "__call__" in GradientCheckpointingLayer.__dict__
"""Whether, in this version of transformers, a layer runs again around `forward`, not within it."""

Places = Mapping[nn.Module, tuple[LinearGroup, int]]


class FusedLayer:
    """What `layer` makes of packed rows; its own forward pass for all else.

    Args:
        layer: A decoder layer of transformers, with its adapters attached.
        places: Of each adapted linear layer the group that it is in, and at which place.

    Raises:
        UnknownLayersError: it is not of Llama's kind.
    """

    def __init__(self, layer: nn.Module, places: Places) -> None:
        require_llama_parts(layer)
        self._own = layer.forward
        self._layer: Any = layer
        self.groups = [_group(layer, names, places) for names in PRODUCTS]
        module: Any = layer
        self.norms = [
            _norm(each) for each in (module.input_layernorm, module.post_attention_layernorm)
        ]
        attention = module.self_attn
        self.scale: float = attention.scaling
        self.width: int = attention.head_dim
        # Some layers say for themselves what others leave to their model.
        told = attention if hasattr(attention, "sliding_window") else attention.config
        self._window: int | None = getattr(told, "sliding_window", None)
        if getattr(attention, "attention_dropout", 0.0):
            raise UnknownLayersError("it drops some of its attention")

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or not self._takes(hidden_states, kwargs):
            return self._own(hidden_states, *args, **kwargs)
        cosines, sines = (each[0].contiguous() for each in kwargs["position_embeddings"])
        # Views, whose backward passes are such: that of an index would copy.
        x, turns = hidden_states.squeeze(0), (cosines, sines)
        run = self.run
        if self._runs_again():
            run = partial(self._layer._gradient_checkpointing_func, run)
        output = run(x, turns)
        return output.unsqueeze(0)

    def _runs_again(self) -> bool:
        """Tell whether the layer is to keep its input only, and nobody else sees to it."""
        layer = self._layer
        wanted: bool = layer.gradient_checkpointing and layer.training and torch.is_grad_enabled()
        return wanted and not _CALLS_RUN_AGAIN

    def _takes(self, x: torch.Tensor, options: Mapping[str, Any]) -> bool:
        """Tell whether this is a pass of packed rows that all go through explicit products."""
        turns = options.get("position_embeddings")
        others = ("attention_mask", "past_key_values")
        if not layout.is_active() or any(options.get(name) is not None for name in others):
            return False
        dtype = self.norms[0][0].dtype
        if turns is None or {x.dtype, turns[0].dtype} != {dtype} or len(x) != 1:
            return False
        if turns[0].shape != (1, x.shape[1], self.width):
            return False
        longest = layout.current().longest
        most = attention_of(x).longest
        return longest <= most and (self._window is None or longest <= self._window)

    def run(self, x: torch.Tensor, turns: Turns) -> torch.Tensor:
        """Return the layer's output for hidden states x [T, d] under the active layout."""
        training = self._layer.training
        found = [group.parts(x, training=training) for group in self.groups]
        rows = layout.current()
        parameters = [each for _, several in found for each in several]
        parts = [each for each, _ in found]
        output: torch.Tensor = _Layer.apply(x, self, parts, turns, rows, *parameters)
        return output


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        layer: FusedLayer,
        parts: list[list[Part]],
        turns: Turns,
        rows: Layout,
        *_: Any,
    ) -> torch.Tensor:
        weights = [group.weights for group in layer.groups]
        x = x.contiguous()
        multiply, between = products_of(x).multiply, _operators_of(x)
        first, second = x.new_empty(2, len(x), dtype=torch.float32)
        normal = between.rescale(x, *layer.norms[0], out=pool.empty(x, *x.shape), factors=first)
        projected, of_heads = multiply(normal, weights[0], parts[0])
        heads = _by_head(projected, layer)
        attended = pool.empty(x, *heads[0].shape)
        states = attention_of(x).attend(heads, turns, layer.scale, rows, attended)
        attended = attended.flatten(1)
        found, of_output = multiply(attended, weights[1], parts[1])
        places = pool.empty(x, *x.shape), pool.empty(x, *x.shape)
        middle, other = between.add_and_rescale(
            x, found, *layer.norms[1], out=places, factors=second
        )
        both, of_gates = multiply(other, weights[2], parts[2])
        output, of_down = multiply(gate(both), weights[3], parts[3])
        output.add_(middle)
        hidden = [of_heads, of_output, of_gates, of_down]
        ctx.save_for_backward(
            *(normal, first, attended, other, second, both, *turns),
            *states,
            *(each for several in hidden for each in several),
        )
        ctx.layer, ctx.parts, ctx.rows = layer, parts, rows
        ctx.sizes = [len(several) for several in (states, *hidden)]
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        layer, parts, rows = ctx.layer, ctx.parts, ctx.rows
        weights = [group.weights for group in layer.groups]
        # Once: a pass that runs again gives them out once.
        normal, first, attended, other, second, both, *rest = ctx.saved_tensors
        turns, others = (rest[0], rest[1]), iter(rest[2:])
        states, *hidden = (list(islice(others, n)) for n in ctx.sizes)
        how, rescale_back = products_of(normal), _operators_of(normal).rescale_back
        send_back, matrix_gradients = how.send_back, how.matrix_gradients
        gradient = gradient.contiguous()

        to_product, sent = send_back(gradient, weights[3], parts[3], hidden[3])
        assert to_product is not None
        to_both, product = gate_back(to_product, both)
        of_down = matrix_gradients(product, parts[3], sent)
        to_other, sent = send_back(to_both, weights[2], parts[2], hidden[2])
        of_gates = matrix_gradients(other, parts[2], sent)
        assert to_other is not None
        (weight, _), out = layer.norms[1], pool.empty(gradient, *gradient.shape)
        to_middle = rescale_back(to_other, other, weight, second, gradient, out=out)

        to_attended, sent = send_back(to_middle, weights[1], parts[1], hidden[1])
        of_output = matrix_gradients(attended, parts[1], sent)
        assert to_attended is not None
        to_projected = pool.empty(normal, len(normal), sum(layer.groups[0].outputs))
        by_head = to_attended.unflatten(1, (-1, layer.width))
        to_heads = _by_head(to_projected, layer)
        attention_of(normal).attend_back(by_head, states, turns, layer.scale, rows, to_heads)
        wanted = ctx.needs_input_grad[0]
        sender = to_projected, weights[0], parts[0], hidden[0]
        to_normal, sent = send_back(*sender, wanted=wanted)
        of_heads = matrix_gradients(normal, parts[0], sent)
        to_x = None
        if to_normal is not None:
            (weight, _), out = layer.norms[0], pool.empty(gradient, *gradient.shape)
            to_x = rescale_back(to_normal, normal, weight, first, to_middle, out=out)
        return (to_x, None, None, None, None, *of_heads, *of_output, *of_gates, *of_down)


def _operators_of(x: torch.Tensor) -> Operators:
    found = operators_of(x)
    assert found is not None  # or the layer would not have been fused
    return found


def _by_head(projected: torch.Tensor, layer: FusedLayer) -> list[torch.Tensor]:
    """Return queries, keys and values [T, heads, width] of all three [T, all outputs]."""
    parts = projected.split(layer.groups[0].outputs, -1)
    return [part.unflatten(-1, (-1, layer.width)) for part in parts]


def _group(layer: nn.Module, names: Sequence[str], places: Places) -> LinearGroup:
    """Return the group that consists of just these modules, in this order."""
    found = [places.get(layer.get_submodule(name)) for name in names]
    groups = {id(each[0]): each[0] for each in found if each is not None}
    numbers = [None if each is None else each[1] for each in found]
    if len(groups) != 1 or numbers != list(range(len(names))):
        raise UnknownLayersError(f"{', '.join(names)} are not taken together")
    (group,) = groups.values()
    if len(group.weights) != len(names):
        raise UnknownLayersError(f"other layers are taken together with {names[0]}")
    return group


def _norm(norm: nn.Module) -> tuple[torch.Tensor, float]:
    """Return weight and epsilon of an RMS normalisation that can be divided by."""
    weight, epsilon = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", None)
    if (
        not isinstance(weight, torch.Tensor)
        or not isinstance(epsilon, float)
        or weight.requires_grad
        or not can_divide(weight)
    ):
        raise UnknownLayersError("its norm is another, or has weights of 0")
    return weight.data, epsilon


@torch.no_grad()
def fuse(
    layer: nn.Module, places: Places, adapter: str, tolerance: Mapping[torch.dtype, float]
) -> FusedLayer:
    """Return a `FusedLayer` that on random numbers was within `tolerance` of `layer` itself.

    Args:
        layer: With its norms and products not yet swapped, or swapped.
        places: Of each adapted linear layer the group that it is in, and at which place.
        adapter: Which adapter it is tried with.
        tolerance: Largest relative difference of what the layer adds, by dtype.

    Raises:
        UnknownLayersError: it is of another kind.
    """
    fused = FusedLayer(layer, places)
    weight, _ = fused.norms[0]
    on_gpu = weight.device.type == "cuda"
    if operators_of(weight) is None or (on_gpu and not FlashAttention.takes(weight, fused.width)):
        raise UnknownLayersError(f"it is on {weight.device} in {weight.dtype}")
    draw = torch.Generator().manual_seed(0)
    n = sum(TRIED_TOKENS)
    x = torch.randn(n, len(weight), generator=draw).to(weight)
    angles = torch.rand(n, fused.width // 2, generator=draw) * 6
    angles = torch.cat((angles, angles), -1)
    turns = angles.cos().to(x), angles.sin().to(x)
    was_training = layer.training
    layer.eval()
    try:
        own = _row_by_row(layer, x, turns)
        with layout.active(Layout.of(TRIED_TOKENS, adapter)):
            error = _difference(fused.run(x, turns), own, x)
        if not error <= tolerance[x.dtype]:
            noise = _difference(_row_by_row(layer, _shaken(x, draw), turns), own, x)
            if not error <= ROUNDINGS * noise:
                raise UnknownLayersError(f"tried on numbers, it differs by {error:.1e}")
    finally:
        layer.train(was_training)
    return fused


def _row_by_row(layer: Any, x: torch.Tensor, turns: Turns) -> torch.Tensor:
    """Return what a layer's own forward pass makes of rows of `TRIED_TOKENS`."""
    found = []
    for row, *place in zip(*(each.split(TRIED_TOKENS) for each in (x, *turns)), strict=True):
        turned = tuple(each[None] for each in place)
        output = layer.forward(row[None], attention_mask=None, position_embeddings=turned)
        if not isinstance(output, torch.Tensor):
            raise UnknownLayersError("it returns more than hidden states")
        found.append(output[0])
    return torch.cat(found)


def _difference(found: torch.Tensor, expected: torch.Tensor, x: torch.Tensor) -> float:
    """Return by what share two ways differ in what a layer adds to x."""
    # In float64: what a layer adds may be small beside what it is added to.
    one, other = (each.double() - x for each in (found, expected))
    return float((one - other).norm() / other.norm())


def _shaken(x: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Return x, each number larger or smaller by about half of what its dtype can tell apart."""
    signs = torch.randint(2, x.shape, generator=draw).to(x.device) * 2 - 1
    limit = torch.finfo(x.dtype).eps / 2
    return x + (x.double() * signs * limit).to(x.dtype)
