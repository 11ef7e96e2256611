"""What an adapter makes of the base model's linear layers, whatever method trained it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal

import torch

from worker.kernels import Numbers
from worker.kernels.matrix import LowRank

Variant = Literal["meft1", "meft2", "meft3"]
VECTORS = {"gain_in": 1.0, "gain": 1.0, "shift": 0.0, "weight": 0.0, "bias": 0.0}
"""What has one vector for each adapter, and the number that stands for a row without."""
_TENSORS = ("a", "b", *VECTORS)


@dataclass(frozen=True, slots=True)
class BaseLinear:
    """The frozen layer below an adapter: `weight` [out, in], dequantised; `bias` [out] or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """``U f(D x + b) + c``: D [r, d], b [r], U [d, r], c [d]; f by transformers' name."""

    down: torch.Tensor
    down_bias: torch.Tensor
    up: torch.Tensor
    up_bias: torch.Tensor
    activation: str

    @property
    def width(self) -> int:
        return self.down.shape[0]

    def tensors(self) -> dict[str, torch.Tensor]:
        names = ("down", "down_bias", "up", "up_bias")
        return {name: getattr(self, name) for name in names}

    def cast(self, dtype: torch.dtype) -> "Bottleneck":
        """Return a copy in `dtype`."""
        tensors = {name: each.to(dtype, copy=True) for name, each in self.tensors().items()}
        return Bottleneck(**tensors, activation=self.activation)


@dataclass(frozen=True, slots=True)
class TwoStreams:
    """That a Transformer layer runs in two streams (MEFT, arXiv 2306.00477); λ is 2^-bits."""

    variant: Variant
    bits: int


@dataclass(frozen=True, slots=True)
class ModuleChange:
    """What becomes of one module of the base; what is None or not there stays as it is.

    A linear layer ``y = W x + b`` becomes ``gain · (W (gain_in · x) + b) + shift + B(A(x))``, and
    the bottleneck ``output``, if any, then adds its own of that. Low-rank methods have `a` [r, in]
    and `b` [out, r], yet to be multiplied by `scale`; methods that rescale have `gain_in` [in],
    `gain` [out] and `shift` [out], in float32. A norm has another `weight` or `bias` [d]. A
    Transformer layer has `streams`, and bottlenecks by their places: ``attention``,
    ``feed_forward``, ``coupling``.
    """

    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    scale: float = 1.0
    """Above 0; 1 in what `cast` returns."""
    low_rank: LowRank | None = None
    """Stands for `a` and `b` where a compiled loop reads them in its own order."""
    gain_in: torch.Tensor | None = None
    gain: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    bottlenecks: Mapping[str, Bottleneck] = field(default_factory=dict)
    streams: TwoStreams | None = None

    @property
    def rank(self) -> int:
        if self.low_rank is not None:
            return self.low_rank.rank
        return 0 if self.a is None else self.a.shape[0]

    @property
    def width(self) -> int:
        """The largest width of a bottleneck."""
        return max((each.width for each in self.bottlenecks.values()), default=0)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors that are there, by name."""
        found = {name: getattr(self, name) for name in _TENSORS}
        if self.low_rank is not None:
            found |= {"a": self.low_rank.a, "b": self.low_rank.b}
        for place, bottleneck in self.bottlenecks.items():
            found |= {f"{place}.{name}": each for name, each in bottleneck.tensors().items()}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def cast(
        self, dtype: torch.dtype, low_rank: torch.dtype | LowRank | None = None
    ) -> "ModuleChange":
        """Return a copy as `AdapterWeights.cast`; a `LowRank` stands for its A and B."""
        matrices: dict[str, Any] = {"low_rank": self.low_rank}
        if isinstance(low_rank, LowRank):
            matrices = {"low_rank": low_rank}
        elif self.a is not None and self.b is not None:
            matrices["a"] = _times(self.a, 1, low_rank or dtype)
            matrices["b"] = (
                _times(self.b, self.scale, dtype)
                if low_rank is None
                else _times(self.b.T, self.scale, low_rank).T
            )
        vectors = {name: getattr(self, name) for name in VECTORS}
        return ModuleChange(
            **matrices,
            **{name: each.clone() for name, each in vectors.items() if each is not None},
            bottlenecks={name: each.cast(dtype) for name, each in self.bottlenecks.items()},
            streams=self.streams,
        )

    def changes_nothing(self) -> bool:
        """Whether the module stays what it was: B and U are zero, gains one, shifts zero."""
        gains = (g for g in (self.gain_in, self.gain) if g is not None)
        added = [each for b in self.bottlenecks.values() for each in (b.up, b.up_bias)]
        added += [each for each in (self.b, self.shift) if each is not None]
        return (
            not any(bool(each.any()) for each in added)
            and all(bool((gain == 1).all()) for gain in gains)
            and self.weight is None
            and self.bias is None
            and self.streams is None
        )


def _times(matrix: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """Return a contiguous copy, multiplied in float32 before it is rounded."""
    return torch.mul(matrix, scale, out=matrix.new_empty(matrix.shape, dtype=dtype))


@dataclass(frozen=True)
class AdapterWeights:
    """A checked adapter: its identity and, by full module path, what it changes."""

    digest: str
    modules: Mapping[str, ModuleChange]
    places: Numbers | None = None
    """Where the matrices of each module of the base are, as `Slots.prepare` finds them."""

    @property
    def rank(self) -> int:
        """The largest rank of any module; 0 where nothing is of low rank."""
        return max((change.rank for change in self.modules.values()), default=0)

    @property
    def width(self) -> int:
        """The largest width of any bottleneck; 0 where there is none."""
        return max((change.width for change in self.modules.values()), default=0)

    @property
    def streams(self) -> TwoStreams | None:
        """How its Transformer layers run, if not in one stream; the same for all of them."""
        return next((each.streams for each in self.modules.values() if each.streams), None)

    @cached_property
    def adds_only(self) -> bool:
        """Whether it does no more than add B(A(x))."""
        return all(
            change.streams is None and change.tensors().keys() == {"a", "b"}
            for change in self.modules.values()
        )

    @property
    def n_bytes(self) -> int:
        tensors = [t for change in self.modules.values() for t in change.tensors().values()]
        return sum({each.data_ptr(): each.nbytes for each in tensors}.values())

    def cast(
        self,
        dtype: torch.dtype,
        low_rank: torch.dtype | None = None,
        packed: Mapping[str, LowRank] = MappingProxyType({}),
    ) -> "AdapterWeights":
        """Return a copy with its matrices in `dtype`; gains stay float32: half is coarse near 1.

        It owns its memory: an adapter that was read lies in its file.

        Args:
            dtype: Of bottlenecks, and of A and B unless `low_rank` is another.
            low_rank: Of A and B, which then are stored as A and Bᵀ.
            packed: What stands for A and B of some modules.
        """
        modules = {
            path: change.cast(dtype, packed.get(path, low_rank))
            for path, change in self.modules.items()
        }
        return AdapterWeights(self.digest, modules)
