"""Swap the forward passes of a PEFT model's modules for packed ones, keeping modules and names.

Which modules share an input is not guessed from their names (`siblings`), and the swap of a norm,
of a gated feed-forward or of a whole layer stays only if it gives the same on random input. Outside
of a packed pass every module is its own again.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import structlog
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from worker.int8 import Int8Linear
from worker.kernels.training import compile_
from worker.training.packed import layout, rope
from worker.training.packed.frozen import FrozenWeight
from worker.training.packed.fused_layer import PRODUCTS, FusedLayer, fuse
from worker.training.packed.layout import Layout
from worker.training.packed.lora import LinearGroup
from worker.training.packed.matrices import Matrices
from worker.training.packed.norm import RmsNorm, can_divide
from worker.training.packed.siblings import (
    PROBE_TOKENS,
    SharedInput,
    Sibling,
    base_layer,
    can_take,
    groups_by_input,
    pairs_of,
)
from worker.transformer_blocks import UnknownLayersError

log = structlog.get_logger(__name__)

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Largest relative error of a swapped module against its own forward pass."""

ALL_PRODUCTS = {name for names in PRODUCTS for name in names}
Forward = Callable[[torch.Tensor], torch.Tensor]


@dataclass(slots=True)
class Rewired:
    """What was swapped. `missed` names adapted modules that keep PEFT's own forward pass."""

    n_groups: int = 0
    n_norms: int = 0
    n_gated: int = 0
    n_fused: int = 0
    has_rope: bool = False
    missed: list[str] = field(default_factory=list)


def rewire(model: PeftModel, *, cache_weights: bool) -> Rewired:
    """Swap what can be swapped in `model`, in place.

    Args:
        model: On its device, with its adapter attached and active.
        cache_weights: Keep NF4 weights dequantised (see `FrozenWeight`).
    """
    done = Rewired()
    places: dict[nn.Module, tuple[LinearGroup, int]] = {}
    matrices = Matrices()
    for modules in groups_by_input(model, _beside_adapters(model)):
        weights = [FrozenWeight(base_layer(each), cache=cache_weights) for each in modules]
        group = LinearGroup(weights, pairs_of(modules), matrices)
        shared = SharedInput(group, len(modules))
        for index, module in enumerate(modules):
            places[module] = (group, index)
            _replace(module, Sibling(shared, module, index))
        done.n_groups += 1
    done.has_rope = rope.install(model.get_base_model())
    adapter = model.active_adapter
    for name, module in model.named_modules():
        if module not in places and isinstance(module, BaseTunerLayer):
            done.missed.append(name)
        # Below an adapter's layer, a norm may compute with other parameters than its own.
        norm = None if name.endswith(".base_layer") else _norm_forward(module)
        if norm is not None and _swap(module, norm, module.weight.shape[0], adapter):
            done.n_norms += 1
        gated = _gated_forward(module, places)
        if gated is not None and _swap(module, gated, module.gate_proj.in_features, adapter):
            done.n_gated += 1
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            done.n_fused += _fuse(module, places, adapter)
    if done.n_fused and model.device.type == "cpu":
        compile_(_product_dtype(model))
    return done


def _beside_adapters(model: nn.Module) -> set[nn.Module]:
    """Return what multiplies in layers that can be fused only as a whole, if adapters are there.

    So a layer of which some products have no adapter is one node, too.
    """
    found: set[nn.Module] = set()
    for layer in model.modules():
        if not isinstance(layer, GradientCheckpointingLayer):
            continue
        products = {module for name, module in layer.named_modules() if name in ALL_PRODUCTS}
        tuners = [module for module in layer.modules() if isinstance(module, BaseTunerLayer)]
        if tuners and products.issuperset(tuners) and all(map(can_take, tuners)):
            found |= products
    return found


def _fuse(layer: nn.Module, places: dict[nn.Module, tuple[LinearGroup, int]], adapter: str) -> bool:
    """Replace the forward pass of a whole layer if it is of the kind that can be fused."""
    try:
        fused = fuse(layer, places, adapter, TOLERANCE)
    except UnknownLayersError as error:
        log.debug("layer_not_fused", reason=str(error))
        return False
    _replace(layer, fused)
    return True


def undo(model: nn.Module) -> None:
    """Give every module of `model` its own forward pass back."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), Sibling | _Swapped | FusedLayer):
            del module.forward


def _norm_forward(module: nn.Module) -> Forward | None:
    """Return the packed pass of what looks like a frozen RMS normalisation."""
    weight, epsilon = getattr(module, "weight", None), _epsilon(module)
    if (
        epsilon is None
        or not isinstance(weight, torch.Tensor)
        or weight.dim() != 1
        or weight.requires_grad
        or getattr(module, "bias", None) is not None
        or "RMSNorm" not in type(module).__name__
    ):
        return None
    divides = can_divide(weight)
    return lambda x: RmsNorm.apply(x, weight, epsilon, divides)


def _epsilon(module: nn.Module) -> float | None:
    for name in ("variance_epsilon", "eps"):
        value = getattr(module, name, None)
        if isinstance(value, float):
            return value
    return None


def _gated_forward(
    module: nn.Module, places: dict[nn.Module, tuple[LinearGroup, int]]
) -> Forward | None:
    """Return the packed pass of what looks like ``down(silu(gate x) · up x)``."""
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    known = [places[part] for part in parts if isinstance(part, nn.Module) and part in places]
    if len(known) != len(parts):
        return None
    (both, first), (also, second), (down, place) = known
    alone = len(both.outputs) == 2 and len(down.outputs) == 1
    if both is not also or (first, second, place) != (0, 1, 0) or not alone:
        return None

    def forward(x: torch.Tensor) -> torch.Tensor:
        training = module.training
        return down.gated(both(x, training=training), training=training)

    return forward


def _replace(module: nn.Module, forward: Callable[..., Any]) -> None:
    module.forward = forward  # shadows the class's own


def _swap(module: nn.Module, forward: Forward, width: int, adapter: str) -> bool:
    """Replace the forward pass of `module` if both give the same on random input."""
    own = module.forward
    dtype, device = _product_dtype(module), next(module.parameters()).device
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, PROBE_TOKENS, width, generator=generator).to(device, dtype)
    was_training = module.training
    module.eval()
    with torch.no_grad():
        expected = own(x).float()
        with layout.active(Layout.of([PROBE_TOKENS], adapter)):
            error = (forward(x).float() - expected).norm() / expected.norm()
    module.train(was_training)
    if not error <= TOLERANCE[dtype]:
        return False

    _replace(module, _Swapped(forward, own))
    return True


def _product_dtype(module: nn.Module) -> torch.dtype:
    """Return what the frozen layers of `module` take, or its own weights where it has none."""
    for each in module.modules():
        if isinstance(each, Int8Linear):
            return each.dtype
    parameters = list(module.parameters())
    weight: Any = next((each for each in parameters if not each.requires_grad), parameters[0])
    dtype: torch.dtype = weight.dtype if weight.is_floating_point() else weight.quant_state.dtype
    return dtype


class _Swapped:
    """One forward pass inside of a packed pass, and another outside."""

    def __init__(self, packed: Forward, own: Forward) -> None:
        self._packed = packed
        self._own = own

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._packed(x) if layout.is_active() else self._own(x)
