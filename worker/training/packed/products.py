"""Products with frozen weights and with adapters' matrices, forward and backward, for `lora`."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from worker.training.dropout import Drop
from worker.training.packed.frozen import FrozenWeight
from worker.training.packed.matrices import Columns


@dataclass(frozen=True, slots=True)
class Part:
    """One segment: its rows ``[start, end)``, and its adapter's matrices in a group of layers.

    `matrices` are all of the adapter in the dtype of the product, as `Matrices.cast` returns them,
    and `training` is what it was told. `drop` says what each layer's dropout drops in this pass, if
    it drops any.
    """

    start: int
    end: int
    columns: Columns
    matrices: torch.Tensor
    drop: Drop | None
    training: bool

    @property
    def rows(self) -> slice:
        return slice(self.start, self.end)

    def by_layer(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return A, times its factor, and B of each layer, views."""
        start, n = self.columns.start, len(self.columns)
        views = self.columns.views(self.matrices[start : start + self.columns.size])
        return views[:n], views[n:]


class Products(ABC):
    """Products of a pass, in one of two ways."""

    @staticmethod
    @abstractmethod
    def multiply(
        x: torch.Tensor, weights: Sequence[FrozenWeight], parts: Sequence[Part]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the outputs [T, all outputs] for x [T, inputs], and what `send_back` needs."""

    @staticmethod
    @abstractmethod
    def send_back(
        gradient: torch.Tensor,
        weights: Sequence[FrozenWeight],
        parts: Sequence[Part],
        kept: Sequence[torch.Tensor],
        *,
        wanted: bool = True,
    ) -> tuple[torch.Tensor | None, Any]:
        """Return the gradient of what `multiply` was given, and what `matrix_gradients` needs.

        Args:
            gradient: Of the outputs [T, all outputs].
            weights: Those of the product.
            parts: Those of the product.
            kept: As `multiply` returned it.
            wanted: Whether the input needs a gradient; None is returned if not.
        """

    @staticmethod
    @abstractmethod
    def matrix_gradients(x: torch.Tensor, parts: Sequence[Part], sent: Any) -> list[torch.Tensor]:
        """Return the gradients of the `parameters` of each part, float32, for x [T, inputs]."""
