"""The modules of the base model, wrapped once; every row gets its own adapter's change."""

from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from worker.inference.engine.bottlenecks import beside
from worker.inference.engine.columns import Lanes
from worker.inference.engine.params import ModuleShape
from worker.inference.engine.slots import LayerBuffers, Slots
from worker.inference.engine.weights import BaseLinear
from worker.inference.engine.wrapped import Adapted, AdaptedLayer, AdaptedNorm, is_norm
from worker.transformer_blocks import (
    UnknownLayersError,
    feed_forward_of,
    transformer_layers,
)


class AdaptedLinear(Adapted):
    """A linear layer that does to each row what the row's adapter makes of it (`ModuleChange`)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `x` [rows, …, in] to [rows, …, out]; without adapters, the base's own tensor."""
        y: torch.Tensor
        slots, buffers = self._slots, self._mine
        if slots is None or buffers is None or not slots.active:
            y = self.base(x)
            return y
        if slots.adds_only:
            return self._with_low_rank(x, self.base(x), slots, buffers)
        gains = {
            name: _of_rows(slots, buffers.vectors[name], x.dim())
            for name in ("gain_in", "gain", "shift")
            if self._users(name)
        }
        y = self.base((x * gains["gain_in"]).to(x.dtype) if "gain_in" in gains else x)
        if "gain" in gains:
            scaled = y * gains["gain"]
            y = (scaled + gains["shift"] if "shift" in gains else scaled).to(y.dtype)
        y = self._with_low_rank(x, y, slots, buffers)
        for bottlenecks in buffers.bottlenecks.values():
            if bottlenecks.is_used_by(slots.active):
                y = y + bottlenecks.added(y, slots.index, slots.active).to(y.dtype)
        return y

    def _with_low_rank(
        self, x: torch.Tensor, y: torch.Tensor, slots: Slots, buffers: LayerBuffers
    ) -> torch.Tensor:
        if slots.places is not None:
            return self._added(x, y, slots)
        if buffers.a is None or buffers.b is None:
            return y
        if not slots.takes_all and buffers.low_rank.isdisjoint(slots.active):
            return y
        columns = slots.low_rank
        lanes = columns.lanes
        if lanes is not None and (lanes.is_even or x.numel() == len(x) * x.shape[-1]):
            return y.add_(_through_lanes(x, *buffers.by_lane(), lanes).view(y.shape))
        a, b = buffers.a[columns.span], buffers.b[columns.span]
        own = _times(x, a.T)
        if (mask := columns.mask) is not None:
            # Chosen, not multiplied by 0: what overflows in one row's adapter stays in that row.
            by_row = torch.where(mask[:, None], own.view(len(x), -1, own.shape[-1]), 0.0)
            own = by_row.view(own.shape)
        return _plus(y, own, b)

    def _added(self, x: torch.Tensor, y: torch.Tensor, slots: Slots) -> torch.Tensor:
        """Return `y` with what the rows' adapters make of `x`; in place, mostly."""
        if not slots.is_touched[slots.numbers[self.path]]:
            return y
        assert slots.compiled is not None
        sums = y.to(slots.compiled).contiguous()
        slots.add_([(sums, self.path)], x.to(slots.compiled))
        return sums.to(y.dtype)


def _times(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Return what `a` [in, C] makes of every token of `x` [rows, …, in], as [tokens, C]."""
    return torch.mm(x.reshape(-1, x.shape[-1]).to(a.dtype), a)


def _plus(y: torch.Tensor, own: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return `y` [rows, …, out] with `own` [tokens, C] times `b` [C, out] added, in its dtype.

    `y` is the base's own output, which nobody else has seen: where it has the adapters' dtype the
    product is added in place. A sum of its own is one more way through memory, which costs as much
    as the product.
    """
    if y.dtype == b.dtype and y.is_contiguous():
        y.view(-1, y.shape[-1]).addmm_(own, b)
        return y
    return y.add_(torch.mm(own, b).view(y.shape))


def _through_lanes(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, lanes: Lanes) -> torch.Tensor:
    """Return x A B [rows, tokens, out] by each row's own lanes of `a` [n, in, w] and `b`."""
    rows = x.reshape(len(x), -1, x.shape[-1])
    if lanes.in_order:
        return torch.bmm(torch.bmm(rows.to(a.dtype), a), b)
    by_lane = rows.index_select(0, lanes.rows).to(a.dtype).view(lanes.n, -1, x.shape[-1])
    results = torch.bmm(torch.bmm(by_lane, a), b).view(len(lanes.rows), -1, b.shape[2])
    results = results.index_select(0, lanes.places.view(-1))
    if lanes.is_taken is not None:
        results = torch.where(lanes.is_taken.view(-1, 1, 1), results, 0.0)
    if lanes.places.shape[1] > 1:
        results = results.view(*lanes.places.shape, *results.shape[1:]).sum(1)
    return results


def _of_rows(slots: Slots, gains: torch.Tensor, n_dims: int) -> torch.Tensor:
    if len(set(slots.rows)) == 1:
        return gains[slots.rows[0]]
    return beside(gains[slots.index], n_dims)


class BaseLayers:
    """What adapters may change of a model, by full path: linear layers, norms, its layers."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Wrap all of them in place."""
        output = model.get_output_embeddings()
        self.shapes: dict[str, ModuleShape] = {}
        self._wrapped: dict[str, Adapted] = {}
        layers = _layers(model)
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.Linear):  # bitsandbytes' Linear4bit is one too
                shape = (module.in_features, module.out_features)
            elif isinstance(module, Conv1D):
                shape = (module.weight.shape[0], module.weight.shape[1])
            elif is_norm(module) and not path.endswith(".base_layer"):
                width, bias = len(module.get_parameter("weight")), getattr(module, "bias", None)
                self.shapes[path] = ModuleShape(
                    width, width, kind="norm", has_bias=isinstance(bias, torch.Tensor)
                )
                self._wrapped[path] = AdaptedNorm(module)
                continue
            else:
                continue
            self.shapes[path] = ModuleShape(*shape, is_output=module is output)
            self._wrapped[path] = AdaptedLinear(module)
        for path, wrapped in self._wrapped.items():
            model.set_submodule(path, wrapped)
        # Last: afterwards a path leads through the wrapper.
        width = model.config.get_text_config().hidden_size
        for number, (path, layer) in enumerate(layers.items()):
            self.shapes[path] = ModuleShape(width, width, kind="layer")
            self._wrapped[path] = AdaptedLayer(layer, is_first=number == 0)
            model.set_submodule(path, self._wrapped[path])

    @property
    def transformer_layers(self) -> list[AdaptedLayer]:
        return [each for each in self._wrapped.values() if isinstance(each, AdaptedLayer)]

    def attach(self, slots: Slots) -> None:
        for path, wrapped in self._wrapped.items():
            wrapped.attach(slots, path)

    def read(self, path: str) -> BaseLinear:
        """Return a linear layer's own weight [out, in] and bias in float32 on the CPU."""
        base: Any = self._wrapped[path].base
        with torch.inference_mode():
            weight = dequantize_module_weight(base).float().cpu()
            bias = base.bias.float().cpu() if isinstance(base.bias, torch.Tensor) else None
        return BaseLinear(weight.T if isinstance(base, Conv1D) else weight, bias)


def _layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the Transformer layers of a model; none where its layers cannot be taken apart."""
    try:
        layers = transformer_layers(model)
        for layer in layers.values():
            feed_forward_of(layer)
    except UnknownLayersError:
        return {}
    return layers
