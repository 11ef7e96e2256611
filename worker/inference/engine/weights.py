"""What an adapter makes of the base model's linear layers, whatever method trained it."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch


@dataclass(frozen=True, slots=True)
class BaseLinear:
    """The frozen layer below an adapter: `weight` [out, in], dequantised; `bias` [out] or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class ModuleChange:
    """One layer ``y = W x + b`` becomes ``gain · (W (gain_in · x) + b) + shift + B(A(x))``.

    Low-rank methods have `a` [r, in] and `b` [out, r], the scale in it; methods that rescale have
    `gain_in` [in], `gain` [out] and `shift` [out], in float32. What is None is left out.
    """

    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    gain_in: torch.Tensor | None = None
    gain: torch.Tensor | None = None
    shift: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return 0 if self.a is None else self.a.shape[0]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors that are there, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def changes_nothing(self) -> bool:
        """Whether the layer stays what it was: B is zero, gains are one, shifts are zero."""
        gains = (g for g in (self.gain_in, self.gain) if g is not None)
        return (
            (self.b is None or not bool(self.b.any()))
            and (self.shift is None or not bool(self.shift.any()))
            and all(bool((gain == 1).all()) for gain in gains)
        )


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """A checked adapter: its identity and, by full module path, what it changes."""

    digest: str
    modules: Mapping[str, ModuleChange]

    @property
    def rank(self) -> int:
        """The largest rank of any module; 0 where nothing is of low rank."""
        return max((change.rank for change in self.modules.values()), default=0)

    @property
    def n_bytes(self) -> int:
        tensors = (t for change in self.modules.values() for t in change.tensors().values())
        return sum(tensor.nbytes for tensor in tensors)

    def cast(self, dtype: torch.dtype) -> "AdapterWeights":
        """Return it with A and B in `dtype`; gains stay float32: near 1, half precision is coarse.

        Nothing is copied that has the dtype already.
        """
        modules = {
            path: replace(
                change,
                a=None if change.a is None else change.a.to(dtype),
                b=None if change.b is None else change.b.to(dtype),
            )
            for path, change in self.modules.items()
        }
        return AdapterWeights(self.digest, modules)
