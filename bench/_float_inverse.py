"""Why MEFT's streams are integers here: the inverse in floats, as published, loses its inputs.

Each layer divides by λ, which multiplies the rounding errors of all layers above by 1/λ.
"""

import torch

from worker.training.reversible.streams import Plan


@torch.no_grad()
def float_errors(
    plan: Plan, hidden: torch.Tensor, scale: float, dtype: torch.dtype = torch.float32
) -> list[float]:
    """Return the relative error of the streams computed back, after 1, 2, … layers from the top.

    Args:
        plan: A pass that has been made, whose layers are run again; without dropout.
        hidden: [B, T, D], what goes into the first layer.
        scale: λ, and β where the layer has one, instead of the powers of 2 of the plan.
        dtype: Of the streams; the layers compute in float32.
    """
    x1 = x2 = hidden.to(dtype)
    states = []
    for layer in plan.couplings:
        f_scale, g_scale = (scale if bits else 1.0 for bits in (layer.f_bits, layer.g_bits))
        states.append((x1, x2))
        y1 = f_scale * x1 + (0 if layer.f is None else layer.f.apply(x2.float()).to(dtype))
        y2 = g_scale * x2 + (0 if layer.g is None else layer.g.apply(y1.float()).to(dtype))
        x1, x2 = (y2, y1) if layer.swaps else (y1, y2)
    errors = []
    for layer in reversed(plan.couplings):
        f_scale, g_scale = (scale if bits else 1.0 for bits in (layer.f_bits, layer.g_bits))
        y1, y2 = (x2, x1) if layer.swaps else (x1, x2)
        x2 = (y2 - (0 if layer.g is None else layer.g.apply(y1.float()).to(dtype))) / g_scale
        x1 = (y1 - (0 if layer.f is None else layer.f.apply(x2.float()).to(dtype))) / f_scale
        true = torch.cat([each.flatten() for each in states.pop()]).double()
        found = torch.cat([x1.flatten(), x2.flatten()]).double()
        errors.append(float((found - true).norm() / true.norm()))
    return errors
