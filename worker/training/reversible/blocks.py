"""Whether the layers of a model can run in two streams, and how they are called.

How layers are taken apart is in `worker.transformer_blocks`, which serving shares.
"""

from inspect import signature
from typing import Any

import torch
from torch import nn

from models.errors import InvalidRequestError
from worker.transformer_blocks import Call as Call
from worker.transformer_blocks import UnknownLayersError, feed_forward_of
from worker.transformer_blocks import after_attention as after_attention
from worker.transformer_blocks import attention_block as attention_block
from worker.transformer_blocks import attention_projection as attention_projection
from worker.transformer_blocks import beside_feed_forward as beside_feed_forward
from worker.transformer_blocks import feed_forward_block as feed_forward_block
from worker.transformer_blocks import transformer_layers as transformer_layers
from worker.transformer_blocks import whole as whole

PROBE_TOKENS = 4
SPLIT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Largest relative difference of a whole layer and its two blocks one after the other."""


def unsupported(reason: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"This base model cannot be trained with MEFT: {reason}. Choose another method, such as "
        "houlsby or lora.",
        param="peft.type",
    )


def probe(model: nn.Module) -> tuple[Call, InvalidRequestError | None]:
    """Return how the layers of `model` answer, from a short pass of it without MEFT.

    Returns:
        The form of a call, and the error to raise for meft3 unless every layer is its attention
        block followed by its feed-forward block.

    Raises:
        InvalidRequestError: the model has no stack of layers that is known.
    """
    try:
        layers = transformer_layers(model)
        feed_forward_of(next(iter(layers.values())))
    except UnknownLayersError as error:
        raise unsupported(str(error)) from None
    calls: list[tuple[nn.Module, torch.Tensor, Call, torch.Tensor]] = []

    def note(layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        n_outputs = len(output) if isinstance(output, tuple) else 0
        hidden = output[0] if n_outputs else output
        calls.append((layer, args[0], Call(args[1:], kwargs, n_outputs), hidden))

    handles = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers.values()]
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    ids = torch.arange(1, PROBE_TOKENS + 1, device=device)[None]
    try:
        with torch.no_grad():
            takes_cache = "use_cache" in signature(model.forward).parameters
            model(input_ids=ids, **({"use_cache": False} if takes_cache else {}))
            for handle in handles:
                handle.remove()
            errors = [_split_error(*each) for each in calls]
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    return Call(n_outputs=calls[0][2].n_outputs), next((each for each in errors if each), None)


def _split_error(
    layer: nn.Module, x: torch.Tensor, call: Call, expected: torch.Tensor
) -> InvalidRequestError | None:
    try:
        found = feed_forward_block(layer, call, attention_block(layer, call, x))
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        reason = str(error)
    else:
        difference = float((found - expected).float().norm() / expected.float().norm())
        if difference <= SPLIT_TOLERANCE[expected.dtype]:
            return None
        reason = f"they differ by {difference:.1e}"
    return unsupported(
        "peft.variant meft3 needs layers that are an attention block followed by a feed-forward "
        f"block, and those of this model are not ({reason}); meft1 and meft2 take layers as a whole"
    )
