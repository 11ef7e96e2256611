"""The linear layers of the base model, wrapped once; every row gets its own adapter's change."""

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from worker.inference.engine.params import LinearShape
from worker.inference.engine.slots import LayerBuffers, Slots
from worker.inference.engine.weights import BaseLinear


class AdaptedLinear(nn.Module):
    """A linear layer that does to each row what the row's adapter makes of it (`ModuleChange`).

    It has no ``weight``: a model that multiplies by a layer's weight itself, and so would lose the
    adapter without a word, fails with an ``AttributeError`` instead.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self._slots: Slots | None = None
        self._mine: LayerBuffers | None = None

    def attach(self, slots: Slots, path: str) -> None:
        """Let `slots` decide what is added; before that the layer is the base's own."""
        self._slots, self._mine = slots, slots.layers[path]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `x` [rows, …, in] to [rows, …, out]; without adapters, the base's own tensor."""
        slots, buffers = self._slots, self._mine
        if slots is None or buffers is None or not slots.active:
            y: torch.Tensor = self.base(x)
            return y
        gains = {
            name: _of_rows(slots, buffers.gains[name], x.dim())
            for name, users in buffers.gained.items()
            if not users.isdisjoint(slots.active)
        }
        y = self.base((x * gains["gain_in"]).to(x.dtype) if "gain_in" in gains else x)
        if "gain" in gains:
            scaled = y * gains["gain"]
            y = (scaled + gains["shift"] if "shift" in gains else scaled).to(y.dtype)
        if buffers.low_rank.isdisjoint(slots.active):
            return y
        assert buffers.a is not None
        assert buffers.b is not None
        own = functional.linear(x.to(buffers.a.dtype), buffers.a[slots.columns])
        if (mask := slots.mask) is not None:
            # Chosen, not multiplied by 0: what overflows in one row's adapter stays in that row.
            own = torch.where(_beside(mask, x.dim()), own, 0.0)
        return (y + own @ buffers.b[slots.columns]).to(y.dtype)


def _of_rows(slots: Slots, gains: torch.Tensor, n_dims: int) -> torch.Tensor:
    if len(set(slots.rows)) == 1:
        return gains[slots.rows[0]]
    return _beside(gains[slots.index], n_dims)


def _beside(by_row: torch.Tensor, n_dims: int) -> torch.Tensor:
    """View [rows, m] as [rows, 1, …, m], to stand beside a tensor of `n_dims` dimensions."""
    return by_row.view(by_row.shape[0], *[1] * (n_dims - 2), by_row.shape[1])


class BaseLayers:
    """The linear layers of a model, by full path."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Wrap every linear layer of `model` in place."""
        output = model.get_output_embeddings()
        self.shapes: dict[str, LinearShape] = {}
        self._layers: dict[str, AdaptedLinear] = {}
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.Linear):  # bitsandbytes' Linear4bit is one too
                shape = (module.in_features, module.out_features)
            elif isinstance(module, Conv1D):
                shape = (module.weight.shape[0], module.weight.shape[1])
            else:
                continue
            self.shapes[path] = LinearShape(*shape, is_output=module is output)
            self._layers[path] = AdaptedLinear(module)
            model.set_submodule(path, self._layers[path])

    def attach(self, slots: Slots) -> None:
        for path, layer in self._layers.items():
            layer.attach(slots, path)

    def read(self, path: str) -> BaseLinear:
        """Return a layer's own weight [out, in] and bias in float32 on the CPU, dequantised."""
        base = self._layers[path].base
        with torch.inference_mode():
            weight = dequantize_module_weight(base).float().cpu()
            bias = base.bias.float().cpu() if isinstance(base.bias, torch.Tensor) else None
        return BaseLinear(weight.T if isinstance(base, Conv1D) else weight, bias)
