"""Sums of products in two ways: by the compiled loop where it is supported, and by PyTorch."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from worker.kernels import products
from worker.kernels.products import Term


class Sums(ABC):
    """How products with frozen weights and with an adapter's narrow matrices are added up."""

    @staticmethod
    @abstractmethod
    def gradients(like: torch.Tensor, n: int) -> torch.Tensor:
        """Return memory for `n` numbers of gradients, in the dtype in which they are summed."""

    @staticmethod
    @abstractmethod
    def add_up(
        terms: Sequence[Term],
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

    @staticmethod
    def gradients(like: torch.Tensor, n: int) -> torch.Tensor:
        return torch.empty(n, dtype=torch.float32)

    add_up = staticmethod(products.add_up_)


class TorchSums(Sums):
    """One product after the other."""

    @staticmethod
    def gradients(like: torch.Tensor, n: int) -> torch.Tensor:
        return like.new_empty(n)

    @staticmethod
    def add_up(
        terms: Sequence[Term],
        out: torch.Tensor,
        *,
        bias: torch.Tensor | None = None,
        n_rounded: int = 0,
    ) -> None:
        first, *others = terms
        torch.mm(first.x, first.w, out=out)
        if bias is not None:
            out.add_(bias)
        for x, w, start in others:
            out[start : start + len(x)].addmm_(x, w)


def of(x: torch.Tensor) -> type[Sums]:
    """Return how sums of products of such an `x` are made."""
    return LoopSums if products.is_supported(x) else TorchSums
