"""Linear layers of a CPU that makes products in bfloat16: weights in the order they are read in.

Otherwise oneDNN puts the weights in order for every product, which for the few rows of a step of
decoding, or of a short prompt, takes longer than the product.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import nn
from torch.nn import functional

from worker.kernels import tiles
from worker.kernels.matrix import COLUMNS, Matrix


class OneDnnMatrix:
    """W [out, in] and b [out] in bfloat16, packed by oneDNN: where it has instructions of its own.

    Args:
        weight: [out, in].
        bias: [out], or None.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.bias = bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self._product = torch.ops.mkldnn._linear_pointwise.default

    def dense(self) -> torch.Tensor:
        """Return a copy of the weight [out, in]."""
        dense: torch.Tensor = self._packed.to_dense()
        return dense

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return bfloat16 [..., out] for `x`, bfloat16 [..., in]."""
        y: torch.Tensor = self._product(x, self._packed, self.bias, "none", [], "")
        return y


class PackedLinear(nn.Linear):
    """``y = x Wᵀ + b`` in bfloat16; W [out, in] is held packed.

    Args:
        linear: The layer in bfloat16, on the CPU; it is not changed.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)  # without the weights that nn.Linear would make
        self.in_features, self.out_features = linear.in_features, linear.out_features
        bias = None if linear.bias is None else linear.bias.detach()
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, False))
        kind = Matrix if tiles.is_supported() and linear.in_features % 2 == 0 else OneDnnMatrix
        self._matrix = kind(linear.weight.detach(), self.bias)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The weights in bfloat16 [out, in]: unpacked at each call."""
        return self._matrix.dense()

    @property
    def adds(self) -> bool:
        """Whether `forward` takes what adapters add into the same sums."""
        return isinstance(self._matrix, Matrix)

    def forward(self, x: torch.Tensor, added: Sequence[int] = ()) -> torch.Tensor:
        """Map `x` bfloat16 [..., in] to bfloat16 [..., out]; `added` as `Matrix` takes it.

        Raises:
            ValueError: something is added to a product that does not take it.
        """
        if isinstance(self._matrix, Matrix):
            return self._matrix(x, added)
        if added:
            raise ValueError("A product by oneDNN takes nothing that adapters add.")
        return self._matrix(x)

    def settle_(self) -> None:
        """Let the weights lie where they are read fastest, now that they will stay as they are."""
        if isinstance(self._matrix, Matrix):
            self._matrix.settle_()


class Joint:
    """Packed layers that take the same numbers, as one product: oneDNN computes that faster.

    Args:
        layers: At least one; all have a bias, or none has.
    """

    def __init__(self, layers: Sequence[PackedLinear]) -> None:
        self.sizes = [layer.out_features for layer in layers]
        # Where there are blocks each layer begins with one, behind columns of nothing.
        block = COLUMNS if layers[0].adds else 1
        gaps = [-size % block for size in self.sizes]
        widths = [size + gap for size, gap in zip(self.sizes, gaps, strict=True)]
        self.starts = [0, *accumulate(widths[:-1])]
        """The first column of each layer."""
        linear = nn.Linear(1, 1, bias=False, device="meta")
        linear.in_features, linear.out_features = layers[0].in_features, sum(widths)
        weights = [
            functional.pad(layer.weight, (0, 0, 0, gap))
            for layer, gap in zip(layers, gaps, strict=True)
        ]
        linear.weight = nn.Parameter(torch.cat(weights), False)
        if layers[0].bias is not None:
            biases = [
                functional.pad(layer.bias, (0, gap))
                for layer, gap in zip(layers, gaps, strict=True)
            ]
            linear.bias = nn.Parameter(torch.cat(biases), False)
        self.whole = PackedLinear(linear)
        self._is_tight = not any(gaps)
        self._input: torch.Tensor | None = None
        self._outputs: dict[int, torch.Tensor] = {}

    def __call__(self, x: torch.Tensor, added: Sequence[int] = ()) -> tuple[torch.Tensor, ...]:
        """Return what each layer makes of `x`: views of one tensor [..., columns].

        `added` is what `PackedLinear.forward` takes, of the columns of that tensor.
        """
        return self.split(self.whole.forward(x, added), -1)

    def split(self, whole: torch.Tensor, dim: int) -> tuple[torch.Tensor, ...]:
        """Return each layer's own stretch of `whole`, which has all of them along `dim`."""
        if self._is_tight:
            return whole.split(self.sizes, dim)
        stretches = zip(self.starts, self.sizes, strict=True)
        return tuple(whole.narrow(dim, start, size) for start, size in stretches)

    def part(self, x: torch.Tensor, number: int) -> torch.Tensor:
        """Return what one layer makes of `x`; the others' results wait for the same tensor."""
        if self._input is not x or number not in self._outputs:
            self._input, self._outputs = x, dict(enumerate(self(x)))
        output = self._outputs.pop(number)
        if not self._outputs:
            self._input = None
        return output.contiguous()


class JointPart(PackedLinear):
    """One layer of a `Joint`, for those who call it by itself."""

    def __init__(self, joint: Joint, number: int, layer: PackedLinear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_parameter("bias", layer.bias)
        self._joint, self._number = joint, number

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The weights in bfloat16 [out, in]: unpacked at each call."""
        return self._joint.split(self._joint.whole.weight, 0)[self._number]

    @property
    def adds(self) -> bool:
        return False

    def forward(self, x: torch.Tensor, added: Sequence[int] = ()) -> torch.Tensor:
        """Map `x` bfloat16 [..., in] to bfloat16 [..., out].

        Raises:
            ValueError: something is added, which only the whole product takes.
        """
        if added:
            raise ValueError("One of several joint layers takes nothing that adapters add.")
        return self._joint.part(x, self._number)

    def settle_(self) -> None:
        """Let all of the joint layers, once."""
        if self._number == 0:
            self._joint.whole.settle_()


def is_supported() -> bool:
    """Whether this processor has products in bfloat16, and somebody packs weights for them."""
    return tiles.is_supported() or (
        torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def pack_(model: nn.Module) -> int:
    """Replace every ``nn.Linear`` in bfloat16 of `model` in place; return how many there are.

    Their own weights are given up; a head that shares them with the embedding has its own then.
    """
    if not is_supported():
        return 0
    layers = {
        path: module
        for path, module in model.named_modules()
        if type(module) is nn.Linear and module.weight.dtype == torch.bfloat16
    }
    for path, module in layers.items():
        model.set_submodule(path, PackedLinear(module))
    return len(layers)


def settle_(model: nn.Module) -> None:
    """Let the packed weights of `model` lie where they are read fastest."""
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.settle_()
