"""Put an adapter on a model through PEFT: float32 weights from a seed, whatever the base is in."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from worker.heads import COPIES, head_paths, head_settings


def attach_adapter(
    model: PreTrainedModel | PeftModel,
    config: PeftConfig,
    seed: int,
    adapter: str,
    start: Callable[[PeftModel], None] = lambda _: None,
) -> PeftModel:
    """Add trainable float32 weights to `model`, in place.

    Args:
        model: A base, or one that has adapters already, which stay as they are.
        config: Of the adapter.
        seed: Of the first weights, which do not depend on the other adapters.
        adapter: PEFT's name of what is added.
        start: Sets other first weights; called with torch's random numbers started by `seed`.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    heads = head_paths(base)
    if heads:
        for name, value in head_settings(heads, getattr(config, "target_modules", None)).items():
            setattr(config, name, value)
    if not base.can_generate() or base.config.is_encoder_decoder:
        config.task_type = None
    with torch.random.fork_rng(), without_known_warnings():
        torch.manual_seed(seed)
        if isinstance(model, PeftModel):
            model.add_adapter(adapter, config)
            adapted = model
        else:
            fresh = get_peft_model(model, config, adapter_name=adapter)
            assert isinstance(fresh, PeftModel)
            adapted = fresh
        start(adapted)
    for name, parameter in adapted.named_parameters():
        if adapter in name.split("."):
            parameter.data = parameter.data.float()
    adapted.set_requires_grad(adapter)  # PEFT freezes the adapters that are not active
    return adapted


def redraw_lora(model: PeftModel, start: bool | str, seed: int) -> None:
    """Draw A and B of the active adapter again, as PEFT does for a new one.

    Args:
        model: With plain LoRA on linear layers.
        start: PEFT's ``init_lora_weights``.
        seed: Starts torch's random numbers, as in `attach_adapter`.
    """
    adapter = model.active_adapter
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for module in model.modules():
            if not isinstance(module, LoraLayer) or adapter not in module.lora_A:
                continue
            pair: Any = (module.lora_A[adapter], module.lora_B[adapter])
            for linear in pair:
                linear.reset_parameters()  # a new layer draws these before it is given its start
            module.reset_lora_parameters(adapter, start)
            places = [linear.weight.data for linear in pair]
            # PEFT holds them at first in the dtype that the base is held in, or computes in.
            module._move_adapter_to_device_of_base_layer(adapter)
            for linear, place in zip(pair, places, strict=True):
                linear.weight.data = place.copy_(linear.weight)


@contextmanager
def without_known_warnings() -> Iterator[None]:
    """Keep PEFT quiet about what is so on purpose, or its own affair."""
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5.24 for an attribute under its old name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        # VeRA, RandLoRA: the fixed matrices are drawn again from the number in the file.
        warnings.filterwarnings("ignore", r"Specified to not (save|load)", UserWarning)
        # OFT: a block is as wide as the nearest divisor of the layer's inputs.
        warnings.filterwarnings("ignore", "Invalid `oft_block_size`", UserWarning)
        yield


def linear_layers(
    model: PreTrainedModel | PeftModel, *, with_head: bool = False
) -> dict[str, nn.Module]:
    """Return the base's linear layers by its own paths, those of adapters left out.

    Args:
        model: A base, with adapters or without.
        with_head: Whether the language-model head counts.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    head = head_of(base)
    heads = set(head_paths(base))
    adapted: tuple[str, ...] = ()
    found: dict[str, nn.Module] = {}
    for path, module in base.named_modules():
        if isinstance(module, BaseTunerLayer):
            adapted = (*adapted, f"{path}.")
        if not isinstance(module, nn.Linear | Conv1D) or (module is head and not with_head):
            continue
        if path in heads or f".{COPIES}." in path or path.endswith(".original_module"):
            continue  # a new head is trained whole
        if path.endswith(".base_layer") or not path.startswith(adapted):
            found[path.replace(".base_layer", "")] = module
    return found


def head_of(base: Any) -> nn.Module | None:
    """Return the language-model head of a base, without what an adapter put around it."""
    head = getattr(base, "get_output_embeddings", lambda: None)()
    return head.get_base_layer() if isinstance(head, BaseTunerLayer) else head


def is_transposed(model: PreTrainedModel | PeftModel) -> bool:
    """Tell whether the weights are [in, out], as those of GPT-2's ``Conv1D`` are."""
    return any(isinstance(module, Conv1D) for module in model.modules())
