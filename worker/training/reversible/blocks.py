"""The Transformer layers of a model, and what has to be done to take one apart.

By facts of the modules, not by names of models: a layer is a member of the one list that is as long
as the model is deep; its attention is the child that is called so; its feed-forward is ``mlp``,
``ffn`` or, as in BERT, the pair ``intermediate`` and ``output``.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from models.errors import InvalidRequestError

FEED_FORWARDS = ("mlp", "ffn", "feed_forward")
PROBE_TOKENS = 4
SPLIT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Largest relative difference of a whole layer and its two blocks one after the other."""

Extra = Callable[[torch.Tensor], torch.Tensor]


@dataclass(slots=True)
class Call:
    """What a layer was called with, beside its hidden states, and how it answers.

    `n_outputs` is the length of the tuple that it returns, or 0 where it returns a tensor.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    n_outputs: int = 0


def transformer_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers of a model that has one stack of them, by their paths, from the bottom.

    Raises:
        InvalidRequestError: there is no such stack, or more than one.
    """
    config: Any = model.config
    if config.is_encoder_decoder:
        raise unsupported("it has an encoder and a decoder")
    depth = getattr(config, "num_hidden_layers", None)
    stacks = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == depth
        and len({type(each) for each in module}) == 1
        and attention_of(module[0]) is not None
    }
    if len(stacks) != 1:
        raise unsupported(f"it has {len(stacks)} stacks of {depth} layers with attention")
    [(path, stack)] = stacks.items()
    return {f"{path}.{index}": layer for index, layer in enumerate(stack)}


def unsupported(reason: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"This base model cannot be trained with MEFT: {reason}. Choose another method, such as "
        "houlsby or lora.",
        param="peft.type",
    )


def attention_of(layer: nn.Module) -> nn.Module | None:
    """Return the child of a layer that attends, or None if it is not exactly one."""
    found = [
        child
        for name, child in layer.named_children()
        if ("attn" in name or "attention" in name)
        and any(isinstance(each, nn.Linear | Conv1D) for each in child.modules())
    ]
    return found[0] if len(found) == 1 else None


def feed_forward_of(layer: nn.Module) -> nn.Module:
    """Return the module whose output is added to the residual stream, input being its first.

    Raises:
        InvalidRequestError: the layer has neither form of a feed-forward.
    """
    for name in FEED_FORWARDS:
        module = getattr(layer, name, None)
        if isinstance(module, nn.Module):
            return module
    if is_bert_like(layer):
        output = layer.output
        assert isinstance(output, nn.Module)
        return output
    raise unsupported(f"its layers ({type(layer).__name__}) have no feed-forward that is known")


def is_bert_like(layer: nn.Module) -> bool:
    """Tell whether the feed-forward is ``output(intermediate(x), x)``."""
    children = dict(layer.named_children())
    return {"intermediate", "output"} <= set(children)


def attention_projection(layer: nn.Module) -> nn.Module:
    """Return the last linear layer of the attention, whose output goes to the residual stream."""
    attention = attention_of(layer)
    assert attention is not None
    # Query, key and value come first in every family.
    return [each for each in attention.modules() if isinstance(each, nn.Linear | Conv1D)][-1]


@contextmanager
def beside_feed_forward(layer: nn.Module, extra: Extra | None) -> Iterator[None]:
    """Add `extra` of the feed-forward's input to its output, before any norm that follows."""
    if extra is None:
        yield
        return
    module = feed_forward_of(layer)
    if is_bert_like(layer):

        def add_to_residual(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            inner, x = args
            return inner, x + extra(x).to(x.dtype)

        handle = module.register_forward_pre_hook(add_to_residual)
    else:

        def add_to_output(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            return output + extra(args[0]).to(output.dtype)

        handle = module.register_forward_hook(add_to_output)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def after_attention(layer: nn.Module, extra: Extra | None) -> Iterator[None]:
    """Add `extra` of the attention's output projection to it, before any norm that follows."""
    if extra is None:
        yield
        return

    def add(_: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return output + extra(output).to(output.dtype)

    handle = attention_projection(layer).register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def whole(layer: nn.Module, call: Call, x: torch.Tensor) -> torch.Tensor:
    """Return the hidden states after the layer."""
    output = layer(x, *call.args, **call.kwargs)
    return output[0] if call.n_outputs else output


def attention_block(layer: Any, call: Call, x: torch.Tensor) -> torch.Tensor:
    """Return the layer's output with its feed-forward left out."""
    feed_forward = feed_forward_of(layer)
    if is_bert_like(layer):
        with (
            _instead(layer.intermediate, "forward", lambda attended: attended),
            _instead(feed_forward, "forward", lambda _, attended: attended),
        ):
            return whole(layer, call, x)
    with _instead(feed_forward, "forward", torch.zeros_like):
        return whole(layer, call, x)


def feed_forward_block(layer: Any, call: Call, x: torch.Tensor) -> torch.Tensor:
    """Return the layer's output with its attention left out."""
    if is_bert_like(layer):
        found: torch.Tensor = feed_forward_of(layer)(layer.intermediate(x), x)
        return found
    attention = attention_of(layer)
    assert attention is not None

    def nothing(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(args[0] if args else kwargs["hidden_states"]), None

    with _instead(attention, "forward", nothing):
        return whole(layer, call, x)


@contextmanager
def _instead(owner: nn.Module, name: str, function: Callable[..., Any]) -> Iterator[None]:
    kept = owner.__dict__.get(name)
    owner.__dict__[name] = function
    try:
        yield
    finally:
        del owner.__dict__[name]
        if kept is not None:
            owner.__dict__[name] = kept


def probe(model: nn.Module) -> tuple[Call, InvalidRequestError | None]:
    """Return how the layers of `model` answer, from a short pass of it without MEFT.

    Returns:
        The form of a call, and the error to raise for meft3 unless every layer is its attention
        block followed by its feed-forward block.

    Raises:
        InvalidRequestError: the model has no stack of layers that is known.
    """
    layers = transformer_layers(model)
    feed_forward_of(next(iter(layers.values())))
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
