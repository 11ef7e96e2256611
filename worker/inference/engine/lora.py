"""The linear layers of the base model, wrapped once, and the adapters of the current pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from worker.inference.engine.params import AdapterWeights, LinearShape, LoraWeights


@dataclass(frozen=True, slots=True)
class Stack:
    """All adapters' matrices of one layer: `a` [R, in], `b` [out, R] with the scales in it.

    `layout` has one pair (adapter, rank) for every adapter that changes this layer; R is the sum
    of the ranks.
    """

    a: torch.Tensor
    b: torch.Tensor
    layout: tuple[tuple[int, int], ...]


def stack(adapters: Sequence[AdapterWeights]) -> dict[str, Stack]:
    """Stack the matrices of `adapters`, layer by layer; their ranks and layers may differ."""
    paths = dict.fromkeys(path for adapter in adapters for path in adapter.modules)
    stacks = {}
    for path in paths:
        found = [(i, a.modules[path]) for i, a in enumerate(adapters) if path in a.modules]
        stacks[path] = Stack(
            torch.cat([lora.a for _, lora in found]),
            torch.cat([lora.scale * lora.b for _, lora in found], dim=1),
            tuple((index, lora.a.shape[0]) for index, lora in found),
        )
    return stacks


class ActiveAdapters:
    """What the wrapped layers add in the next forward pass; nothing for the base model.

    Either one adapter for all rows (`use_one`, a prompt) or one for each row (`use_rows`, decode).
    """

    def __init__(self) -> None:
        self.modules: Mapping[str, LoraWeights] = {}
        self.stacks: Mapping[str, Stack] = {}
        self._stacked: tuple[str, ...] = ()
        self._rows: list[int] = []
        self._masks: dict[tuple[tuple[int, int], ...], torch.Tensor] = {}

    def use_one(self, adapter: AdapterWeights | None) -> None:
        self.modules = adapter.modules if adapter is not None else {}
        self._rows = []

    def use_rows(self, adapters: Sequence[AdapterWeights | None]) -> None:
        """Set each row's adapter. Only the stacks are kept between passes, by their digests."""
        distinct = {adapter.digest: adapter for adapter in adapters if adapter is not None}
        digests = tuple(sorted(distinct))
        if digests != self._stacked:
            self.stacks = stack([distinct[digest] for digest in digests])
            self._stacked = digests
        self.modules = {}
        self._rows = [-1 if a is None else digests.index(a.digest) for a in adapters]
        self._masks = {}

    def stack_of(self, path: str) -> Stack | None:
        return self.stacks.get(path) if self._rows else None

    def mask(self, stack: Stack) -> torch.Tensor:
        """Return [rows, 1, R]: whether a column of the stack is of the row's own adapter."""
        if stack.layout not in self._masks:
            owners = [index for index, rank in stack.layout for _ in range(rank)]
            device = stack.a.device
            rows = torch.tensor(self._rows, device=device)[:, None, None]
            self._masks[stack.layout] = rows == torch.tensor(owners, device=device)
        return self._masks[stack.layout]


class LoraLinear(nn.Module):
    """A linear layer that adds ``scale · B(A(x))`` of each row's adapter.

    It has no ``weight``: a model that multiplies by a layer's weight itself, and so would lose the
    adapter without a word, fails with an ``AttributeError`` instead.
    """

    def __init__(self, base: nn.Module, path: str, active: ActiveAdapters) -> None:
        super().__init__()
        self.base = base
        self._path = path
        self._active = active

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `x` [..., in] to [..., out]; without an adapter, the base layer's own tensor."""
        y: torch.Tensor = self.base(x)
        stack = self._active.stack_of(self._path)
        if stack is not None:
            narrow = functional.linear(x.to(stack.a.dtype), stack.a)
            # Chosen, not multiplied by 0: what overflows in one row's adapter stays in that row.
            own = torch.where(self._active.mask(stack), narrow, 0.0)
            return (y + functional.linear(own, stack.b)).to(y.dtype)
        lora = self._active.modules.get(self._path)
        if lora is None:
            return y
        change = functional.linear(functional.linear(x.to(lora.a.dtype), lora.a), lora.b)
        return (y + lora.scale * change).to(y.dtype)


def wrap_linears(model: PreTrainedModel, active: ActiveAdapters) -> dict[str, LinearShape]:
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
