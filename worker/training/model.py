"""The model that is trained: a frozen base as it will be served, and float32 weights on top.

Cast rules: the base stays in the very numbers that the inference server holds (NF4 with bfloat16
norms, embeddings and head; or all of it in bfloat16 or float32), so that what was trained is what
is served. Adapter weights are float32: their updates are far below bfloat16's resolution. Matrix
products run in bfloat16 under autocast, in float32 where the base is float32. Gradient
checkpointing is off; micro-batches bound the memory of activations instead.
"""

from contextlib import AbstractContextManager
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn

from models.domain.training import Precision
from worker.base_models import load_model
from worker.training.methods.base import Method, MethodParams


def build_model(
    directory: Path,
    precision: Precision,
    method: Method,
    params: MethodParams,
    *,
    seed: int,
    device: str,
) -> PeftModel:
    """Load the base in `precision` and attach `method`; the result is in training mode."""
    base = load_model(
        directory, precision=precision.type, double_quant=precision.double_quant, device=device
    )
    model = method.attach(base, params, seed)
    guard_quantised_weights(model)
    model.train()
    return model


def guard_quantised_weights(model: nn.Module) -> None:
    """Raise `RuntimeError` if an evaluation could repack 4-bit weights and so ruin training.

    bitsandbytes does that on a CPU with AVX-512-BF16, in place and without a way back, unless each
    layer forbids it (specs: methods, finding 3).
    """
    for path, module in model.named_modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            raise RuntimeError(f"{path} would be repacked by the first evaluation.")


def autocast(precision: Precision, device: str) -> AbstractContextManager[None]:
    """Return the context in which forward passes run: bfloat16, or none on a float32 base."""
    return torch.autocast(
        torch.device(device).type, dtype=torch.bfloat16, enabled=precision.type != "fp32"
    )


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what is trained, by its name in the adapter file (PEFT's, without ``.default``)."""
    return {
        name.replace(".default.", "."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def linear_shapes(model: PeftModel) -> dict[str, tuple[int, int, bool]]:
    """Return (inputs, outputs, is the head) of the base's linear layers by their own paths."""
    base = model.get_base_model()
    head = base.get_output_embeddings()  # type: ignore[operator]
    shapes = {}
    for path, module in base.named_modules():
        if isinstance(module, nn.Linear) and ".lora_" not in path:
            own_path = path.removesuffix(".base_layer")
            shapes[own_path] = (module.in_features, module.out_features, module is head)
    return shapes


def set_threads(jobs_at_a_time: int) -> None:
    """Share the cores that this process may use between the jobs of one worker."""
    import os

    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // jobs_at_a_time))
