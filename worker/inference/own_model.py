"""A base and one adapter as one model: merged in float32, or with the adapter's modules inside."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from worker.base_models import QUANTISED, compute_dtype, dequantise_, load_model
from worker.heads import Head

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PROBE_TOKENS = 16
MERGE_TOLERANCE = 1e-4
"""Largest relative difference of the logits before and after a merge in float32."""

logger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class OwnModel:
    """A model of its own.

    Args:
        model: In evaluation mode.
        n_bytes: Of its parameters and buffers.
        drift: Relative difference of the logits of a few tokens from those before the merge in
            float32: the norm of the difference over that of the unmerged ones. None if unmerged.
    """

    model: "PreTrainedModel"
    n_bytes: int
    drift: float | None = None


def load_own_model(
    base: Path,
    adapter: Path,
    served: str,
    *,
    precision: str,
    device: str,
    head: Head | None = None,
) -> OwnModel:
    """Load a copy of the base with an adapter.

    Merged models are made in float32, whatever the base is held in: NF4 would have to be quantised
    again (specs: methods, finding 5). They stay so, since the sum does not fit into fewer bits,
    unless they are ``rounded`` to be as fast as the base: then each weight is held in what it has
    in the (dequantised) base that answers, and the error of that is part of the drift.

    Args:
        base: Directory of the base model.
        adapter: Directory of the adapter.
        served: ``merged``, ``rounded``, or ``own`` for the adapter's modules beside the weights.
        precision: How the server holds the base.
        device: Where the model goes.
        head: What the base is loaded with; a causal language model's if None.

    Raises:
        KeyError, RuntimeError, ValueError: the adapter's files do not fit the base, or merged it
            is another model.
    """
    from worker.training.tuners.virtual import with_virtual_tokens

    model: Any = load_model(base, precision=precision, device=device, head=head)
    if precision in QUANTISED:
        dequantise_(model)
    dtypes = {name: each.dtype for name, each in model.named_parameters()}
    if served != "own":
        model = model.float()
    adapted = with_adapter(model, adapter, device)
    whole: PreTrainedModel
    drift = None
    if served != "own":
        if adapted.active_peft_config.is_prompt_learning:
            raise ValueError("virtual tokens cannot be merged into the base")
        expected = _logits(adapted)
        whole = _merged(adapted, adapter.name, expected)
        if served == "rounded":
            for name, parameter in whole.named_parameters():
                parameter.data = parameter.data.to(dtypes.get(name, parameter.dtype))
            lighten_(whole, precision, device)
        drift = _difference(_logits(whole), expected)
    elif adapted.active_peft_config.is_prompt_learning:
        whole = with_virtual_tokens(adapted)
    else:
        whole = adapted.get_base_model()
    whole = whole.requires_grad_(False).eval()
    return OwnModel(whole, _n_bytes(whole), drift)


def lighten_(model: "PreTrainedModel", precision: str, device: str) -> None:
    """Hold the linear layers of a decoder on a CPU as their products are fastest, in place: in
    float16 where it is computed in float32 instead of bfloat16, else packed.

    Args:
        model: Dequantised, where that is how it answers.
        precision: How the server holds the base.
        device: Where the model is.
    """
    from worker.held import leave_files_
    from worker.inference.engine.half_linear import hold_in_half_
    from worker.inference.engine.packed_linear import pack_

    # An encoder-decoder asks its layers for their weights in every pass.
    if device != "cpu" or precision == "fp32" or model.config.is_encoder_decoder:
        return
    if compute_dtype(device).itemsize == 4:
        hold_in_half_(model)
    else:
        pack_(model)
        leave_files_(model)


def _n_bytes(model: "PreTrainedModel") -> int:
    """Return what the weights of a model take; those that `lighten_` made are no parameters."""
    from worker.inference.engine.half_linear import HalfLinear
    from worker.inference.engine.packed_linear import PackedLinear

    light = [each for each in model.modules() if isinstance(each, HalfLinear | PackedLinear)]
    packed = sum(2 * each.in_features * each.out_features for each in light)
    return int(model.get_memory_footprint()) + packed


def with_adapter(model: "PreTrainedModel", adapter: Path, device: str) -> Any:
    """Return PEFT's model of a base and an adapter, all of whose tensors are used.

    Args:
        model: The base, which is changed.
        adapter: Directory of the adapter.
        device: Where the model is.

    Raises:
        KeyError, RuntimeError, ValueError: the adapter's files do not fit the base.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    # Both make their configurations known to PEFT.
    import worker.training.reversible.tuner
    import worker.training.tuners.own  # noqa: F401
    from worker.training.tuners.attach import without_known_warnings

    with without_known_warnings():
        warnings.filterwarnings("ignore", "Found missing adapter keys")  # looked at below
        adapted: Any = PeftModel.from_pretrained(
            model, str(adapter), autocast_adapter_dtype=False, torch_device=device
        )
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        stray = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
        stray ^= set(file.keys())
    if stray:
        raise ValueError(f"tensors are missing or left over: {', '.join(sorted(stray)[:5])}")
    return adapted


def _merged(adapted: Any, digest: str, expected: "torch.Tensor") -> "PreTrainedModel":
    """Return the base with the adapter in its weights, in float32.

    Args:
        adapted: PEFT's model in float32.
        digest: Of the adapter, for the log.
        expected: What `_logits` has of it.

    Raises:
        ValueError: merged, it is another model.
    """
    merged: PreTrainedModel = adapted.merge_and_unload()
    drift = _difference(_logits(merged), expected)
    logger.info("adapter_merged", adapter=digest, drift=drift)
    if not drift <= MERGE_TOLERANCE:
        raise ValueError(f"merged, its logits are off by {drift:.1e}, above {MERGE_TOLERANCE:.0e}")
    return merged


def _difference(found: "torch.Tensor", expected: "torch.Tensor") -> float:
    return float((found - expected).norm() / expected.norm())


def _logits(model: Any) -> "torch.Tensor":
    """Return the logits of a few tokens, [1, T, vocabulary], in float32."""
    import torch

    config = model.config
    # Not the first ones: those are special tokens, whose logits magnify every rounding.
    ids = torch.arange(PROBE_TOKENS, device=model.device)[None] * 7919 % config.vocab_size
    inputs = {"decoder_input_ids": ids} if config.is_encoder_decoder else {}
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(input_ids=ids, use_cache=False, **inputs).logits
    return found.float()
