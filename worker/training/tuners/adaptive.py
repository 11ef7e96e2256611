"""AdaLoRA's own part of a step: orthogonality, and the budget of ranks (arXiv 2303.10512).

Each layer's change is ``scale · P Λ Q``. What is not a job's loss is brought in where its gradients
are complete: the regulariser's gradient before the update, the allocation of ranks after it, both
whatever the objective.
"""

from typing import Any

import torch
from peft import PeftModel
from torch import nn

WARM_UP, SETTLED = 0.1, 0.3
"""Shares of the steps before the budget begins to fall, and after it has ended to."""
_PARTS = ("exp_avg_ipt", "exp_avg_unc")
_PATTERN = "rank_pattern"


def add_orthogonality(model: PeftModel, weight: float) -> None:
    """Add the gradient of ``weight · mean ‖M Mᵀ − I‖_F`` over all P and Q to what is there.

    Section 3.1, equation 4, with the norm and the mean of PEFT's form of it.
    """
    matrices = [each for name, each in _adapted(model) if ".lora_E." not in name]
    with torch.enable_grad():
        terms = []
        for name, each in _adapted(model):
            if ".lora_E." not in name:
                product = each @ each.T if ".lora_A." in name else each.T @ each
                identity = torch.eye(len(product), device=product.device)
                terms.append((product - identity).norm())
        gradients = torch.autograd.grad(weight * torch.stack(terms).mean(), matrices)
    for matrix, gradient in zip(matrices, gradients, strict=True):
        matrix.grad = gradient if matrix.grad is None else matrix.grad + gradient


def allocate(model: PeftModel, step: int, total_steps: int) -> None:
    """Count the step for every rank's importance and set the least important ranks to 0.

    Section 3.2 by PEFT's allocator: the budget falls from the initial ranks to the final ones by
    the cubic schedule of equation 12, between the warm-up and the settled steps. A run of fewer
    steps than that needs keeps all ranks.

    Args:
        model: After the update, its gradients still there.
        step: How many updates there were.
        total_steps: Of the run.
    """
    tuner: Any = model.base_model
    config = tuner.peft_config[tuner.trainable_adapter_name]
    config.total_step = total_steps
    config.tinit = int(WARM_UP * total_steps)
    config.tfinal = max(1, int(SETTLED * total_steps))
    if config.tinit < total_steps - config.tfinal:
        tuner.update_and_allocate(step)


def kept(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return what the allocator has gathered, by names that `put_back` knows."""
    tuner: Any = model.base_model
    allocator, adapter = tuner.rankallocator, tuner.trainable_adapter_name
    found = {
        f"{part}/{name}": value.detach().to("cpu", copy=True).contiguous()
        for part in _PARTS
        for name, value in getattr(allocator, part).items()
    }
    pattern = tuner.peft_config[adapter].rank_pattern or {}
    return found | {
        f"{_PATTERN}/{name}": torch.tensor(ranks, dtype=torch.uint8)
        for name, ranks in pattern.items()
    }


def put_back(model: PeftModel, states: dict[str, torch.Tensor]) -> None:
    """Give a fresh allocator what `kept` returned."""
    tuner: Any = model.base_model
    allocator, adapter = tuner.rankallocator, tuner.trainable_adapter_name
    pattern = {}
    for key, value in states.items():
        part, _, name = key.partition("/")
        if part == _PATTERN:
            pattern[name] = value.bool().tolist()
        else:
            gathered = getattr(allocator, part)
            gathered[name] = value.to(model.device)
            allocator.ipt.setdefault(name, torch.zeros_like(gathered[name]))
    tuner.peft_config[adapter].rank_pattern = pattern or None


def _adapted(model: PeftModel) -> list[tuple[str, nn.Parameter]]:
    tuner: Any = model.base_model
    adapter = tuner.trainable_adapter_name
    return [
        (name, each)
        for name, each in model.named_parameters()
        if ".lora_" in name and name.endswith(f".{adapter}")
    ]
