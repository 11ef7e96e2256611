"""A base and one adapter as one model: merged in float32, or with the adapter's modules inside."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from worker.base_models import dequantise_, load_model
from worker.heads import Head

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PROBE_TOKENS = 16
MERGE_TOLERANCE = 1e-4
"""Largest relative difference of the logits before and after a merge in float32."""

logger = structlog.get_logger(__name__)


def load_own_model(
    base: Path,
    adapter: Path,
    served: str,
    *,
    precision: str,
    device: str,
    head: Head | None = None,
) -> "PreTrainedModel":
    """Load a copy of the base with an adapter that no batch can serve.

    Merged models are held in float32, whatever the base is held in: the sum would not fit into
    fewer bits, and NF4 would have to be quantised again (specs: methods, finding 5).

    Args:
        base: Directory of the base model.
        adapter: Directory of the adapter.
        served: The manifest's ``served``: ``merged`` or ``own``.
        precision: How the server holds the base.
        device: Where the model goes.
        head: What the base is loaded with; a causal language model's if None.

    Raises:
        KeyError, RuntimeError, ValueError: the adapter's files do not fit the base, or merged it
            is another model.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    # Both make their configurations known to PEFT.
    import worker.training.reversible.tuner
    import worker.training.tuners.own  # noqa: F401

    model: Any = load_model(base, precision=precision, device=device, head=head)
    if precision == "nf4":
        dequantise_(model)
    if served == "merged":
        model = model.float()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        warnings.filterwarnings("ignore", "Found missing adapter keys")  # looked at below
        adapted: Any = PeftModel.from_pretrained(
            model, str(adapter), autocast_adapter_dtype=False, torch_device=device
        )
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        stray = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
        stray ^= set(file.keys())
    if stray:
        raise ValueError(f"tensors are missing or left over: {', '.join(sorted(stray)[:5])}")
    if served != "merged":
        return adapted.get_base_model().requires_grad_(False).eval()
    expected = _logits(adapted)
    merged: PreTrainedModel = adapted.merge_and_unload().requires_grad_(False).eval()
    drift = float((_logits(merged) - expected).norm() / expected.norm())
    logger.info("adapter_merged", adapter=adapter.name, drift=drift)
    if not drift <= MERGE_TOLERANCE:
        raise ValueError(f"merged, its logits are off by {drift:.1e}, above {MERGE_TOLERANCE:.0e}")
    return merged


def _logits(model: Any) -> "torch.Tensor":
    """Return the logits of a few tokens, [1, T, vocabulary], in float32."""
    import torch

    config = model.config
    ids = torch.arange(1, 1 + PROBE_TOKENS, device=model.device)[None] % config.vocab_size
    inputs = {"decoder_input_ids": ids} if config.is_encoder_decoder else {}
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(input_ids=ids, use_cache=False, **inputs).logits
    return found.float()
