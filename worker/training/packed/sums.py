"""Sums of products in two ways: by the compiled loop where it is supported, and by PyTorch."""

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch

from worker.kernels import products
from worker.kernels.products import Term


class Sums(ABC):
    """How products with frozen weights and with an adapter's narrow matrices are added up."""

    @staticmethod
    @abstractmethod
    def add_up(
        terms: Iterable[Term],
        out: torch.Tensor,
        *,
        bias: torch.Tensor | None = None,
        n_rounded: int = 0,
    ) -> None:
        """Set `out` to the sum of `terms`, of which the first has all rows, and of a bias.

        The first `n_rounded` terms and the bias are rounded before others are added, at least.
        """


class LoopSums(Sums):
    """Sums in float32, rounded once, or as gradients of matrices not at all."""

    add_up = staticmethod(products.add_up_)


class TorchSums(Sums):
    """One product after the other."""

    @staticmethod
    def add_up(
        terms: Iterable[Term],
        out: torch.Tensor,
        *,
        bias: torch.Tensor | None = None,
        n_rounded: int = 0,
    ) -> None:
        is_first = True
        for x, w, start in terms:
            if is_first:
                torch.mm(x, w, out=out)
                if bias is not None:
                    out.add_(bias)
                is_first = False
            else:
                out[start : start + len(x)].addmm_(x, w)
            del x, w  # before the next is made: it may be a weight that is dequantised


def of(x: torch.Tensor) -> type[Sums]:
    """Return how sums of products of such an `x` are made."""
    return LoopSums if products.is_supported(x) else TorchSums
