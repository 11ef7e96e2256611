"""The model that is trained: a frozen base as it will be served, and float32 weights on top.

Cast rules: the base stays in the very numbers that the inference server holds (NF4 with bfloat16
norms, embeddings and head; or all of it in bfloat16 or float32), so that what was trained is what
is served. Adapter weights are float32: their updates are far below bfloat16's resolution. Matrix
products run in bfloat16 under autocast, in float32 where the base is float32 or the device makes no
products in bfloat16. Micro-batches bound
the memory of activations; only where one row is too much are they computed again (``recompute``).
"""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from models.domain.training import Precision
from worker.base_models import compute_dtype, load_model
from worker.heads import COPIES, Head
from worker.heap import passing_allocations
from worker.inference.engine.params import ModuleShape
from worker.training.methods.base import DEFAULT_ADAPTER, Method, MethodParams
from worker.training.reversible.tuner import PEFT_TYPE as MEFT
from worker.training.reversible.tuner import stack_of
from worker.training.tuners.attach import head_of, linear_layers, without_known_warnings
from worker.training.tuners.families import anatomy

PROBE_TOKENS = 16
LOGITS_TOLERANCE = 1e-5
"""Largest relative difference of the logits before and after an adapter went through the store."""
_READ_BACK = "read_back"


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
    return adapt(load_base(directory, precision, device), method, params, seed)


def load_base(
    directory: Path, precision: Precision, device: str, head: Head | None = None
) -> PreTrainedModel:
    """Load the frozen base of a trainer, for causal language modelling or another `head`."""
    with passing_allocations():
        return load_model(
            directory,
            precision=precision.type,
            double_quant=precision.double_quant,
            device=device,
            head=head,
        )


def adapt(
    base: PreTrainedModel | PeftModel,
    method: Method,
    params: MethodParams,
    seed: int,
    adapter: str = DEFAULT_ADAPTER,
) -> PeftModel:
    """Attach `method` to a base, new head or not; the result is in training mode."""
    model = method.attach(base, params, seed, adapter)
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
    """Return the context in which forward passes run: bfloat16, or none where all is float32."""
    return torch.autocast(
        torch.device(device).type,
        dtype=torch.bfloat16,
        enabled=precision.type != "fp32" and compute_dtype(device) == torch.bfloat16,
    )


def set_training(model: nn.Module, mode: bool) -> None:
    """Put `model`, all modules of which are in one mode, in training or in evaluation mode.

    Where it is in that mode nothing is done: setting it takes each of the thousands of modules of
    a model with adapters in turn, before every step.
    """
    if model.training is not mode:
        model.train(mode)


def trainable_parameters(
    model: nn.Module, adapter: str = DEFAULT_ADAPTER
) -> dict[str, nn.Parameter]:
    """Return what is trained, by its name in the adapter file (PEFT's, without the adapter's)."""
    others = {name for name in getattr(model, "peft_config", {}) if name != adapter}
    found = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if parameter.requires_grad and others.isdisjoint(parts):
            found[".".join(part for part in parts if part not in (adapter, COPIES))] = parameter
    return found


def module_shapes(model: PeftModel) -> dict[str, ModuleShape]:
    """Return what adapters may change of the base, by its own paths, as an inference server does.

    Of Transformer layers only those that run in two streams, since nothing else changes one.
    """
    base: Any = model.get_base_model()
    head = head_of(base)
    shapes = {}
    for path, module in linear_layers(model, with_head=True).items():
        if isinstance(module, nn.Linear):
            inputs, outputs = module.in_features, module.out_features
        else:
            assert isinstance(module, Conv1D)
            inputs, outputs = module.weight.shape
        shapes[path] = ModuleShape(inputs, outputs, is_output=module is head)
    width = base.config.get_text_config().hidden_size
    for path in anatomy(model).norms:
        norm = base.get_submodule(path)
        has_bias = isinstance(getattr(norm, "bias", None), torch.Tensor)
        shapes[path] = ModuleShape(width, width, kind="norm", has_bias=has_bias)
    if MEFT in {config.peft_type for config in model.peft_config.values()}:
        for path in stack_of(model).paths:
            shapes[path] = ModuleShape(width, width, kind="layer")
    return shapes


def gives_same_logits(model: PeftModel, directory: Path) -> bool:
    """Tell whether the adapter in `directory`, read by PEFT, gives the logits of the one attached.

    It is attached beside the other for a moment, so its configuration counts as its tensors do. A
    packed model answers by its modules' own passes here.
    """
    base = model.get_base_model()
    vocabulary = int(base.config.vocab_size)  # type: ignore[union-attr,arg-type]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (1, PROBE_TOKENS), generator=generator).to(model.device)
    [own] = model.active_adapters
    model.eval()
    try:
        with torch.no_grad(), without_known_warnings():
            trained = _answer(model, ids)
            model.load_adapter(str(directory), _READ_BACK, is_trainable=False)
            model.set_adapter(_READ_BACK)
            found = _answer(model, ids)
    finally:
        model.set_adapter(own)
        if _READ_BACK in model.peft_config:
            model.delete_adapter(_READ_BACK)
    error = (found.float() - trained.float()).norm() / trained.float().norm()
    return bool(error <= LOGITS_TOLERANCE)


def _answer(model: PeftModel, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits for `ids`, or the hidden states of a model without a head."""
    config: Any = model.get_base_model().config
    inputs = {"decoder_input_ids": ids} if config.is_encoder_decoder else {}
    output = model(input_ids=ids, use_cache=False, **inputs)
    answer: torch.Tensor = output.logits if "logits" in output else output.last_hidden_state
    return answer


def describe_device(device: str) -> str:
    """Return the kind of a device: what was measured on one of a kind holds for another."""
    if torch.device(device).type == "cuda":
        return str(torch.cuda.get_device_name(device))
    n_threads = torch.get_num_threads()
    return f"CPU, {n_threads} thread{'s' if n_threads > 1 else ''}"


def set_threads(jobs_at_a_time: int) -> None:
    """Share the cores that this process may use between the jobs of one worker.

    Never more than this process has now, which `OMP_NUM_THREADS` says, as for any program.
    """
    import os

    share = max(1, len(os.sched_getaffinity(0)) // jobs_at_a_time)
    torch.set_num_threads(min(share, torch.get_num_threads()))
