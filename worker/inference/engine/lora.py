"""The linear layers of the base model, wrapped once, and the adapter of the current sequence."""

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from worker.inference.engine.params import LinearShape, LoraWeights


class ActiveAdapter:
    """What the wrapped layers add right now; empty for the base model. Set before each forward."""

    def __init__(self) -> None:
        self.modules: Mapping[str, LoraWeights] = {}


class LoraLinear(nn.Module):
    """A linear layer that adds ``scale · B(A(x))`` of the active adapter.

    It has no ``weight``: a model that multiplies by a layer's weight itself, and so would lose the
    adapter without a word, fails with an ``AttributeError`` instead.
    """

    def __init__(self, base: nn.Module, path: str, active: ActiveAdapter) -> None:
        super().__init__()
        self.base = base
        self._path = path
        self._active = active

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `x` [..., in] to [..., out]; without an adapter, the base layer's own tensor."""
        y: torch.Tensor = self.base(x)
        lora = self._active.modules.get(self._path)
        if lora is None:
            return y
        change = functional.linear(functional.linear(x.to(lora.a.dtype), lora.a), lora.b)
        return (y + lora.scale * change).to(y.dtype)


def wrap_linears(model: PreTrainedModel, active: ActiveAdapter) -> dict[str, LinearShape]:
    """Wrap every linear layer of `model` in place and return their shapes by full path."""
    output = model.get_output_embeddings()
    shapes = {}
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):  # bitsandbytes' Linear4bit is one too
            shape = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            shape = (module.weight.shape[0], module.weight.shape[1])
        else:
            continue
        shapes[path] = LinearShape(*shape, is_output=module is output)
        model.set_submodule(path, LoraLinear(module, path, active))
    return shapes
