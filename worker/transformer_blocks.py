"""The Transformer layers of a model, and what has to be done to take one apart: MEFT needs it.

By facts of the modules, not by names of models: a layer is a member of the one list that is as long
as the model is deep; its attention is the child that is called so; its feed-forward is ``mlp``,
``ffn`` or, as in BERT, the pair ``intermediate`` and ``output``.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

FEED_FORWARDS = ("mlp", "ffn", "feed_forward")
LLAMA_PARTS = {
    "": {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"},
    "self_attn": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mlp": {"gate_proj", "up_proj", "down_proj", "act_fn"},
}
"""What a layer of Llama's kind consists of, by the names that its descendants kept."""
Extra = Callable[[torch.Tensor], torch.Tensor]


class UnknownLayersError(ValueError):
    """A model is not built of layers that can be taken apart; says how it is built."""


@dataclass(slots=True)
class Call:
    """What a layer was called with, beside its hidden states, and how it answers.

    `n_outputs` is the length of the tuple that it returns, or 0 where it returns a tensor.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    n_outputs: int = 0


def require_llama_parts(layer: nn.Module, *, also: Collection[str] = ()) -> None:
    """Make sure that a layer consists of `LLAMA_PARTS`, and nothing else but what is in `also`.

    Raises:
        UnknownLayersError: it does not.
    """
    modules = dict(layer.named_modules())
    for path, names in LLAMA_PARTS.items():
        part = modules.get(path)
        found = {name for name, _ in part.named_children()} if part is not None else set()
        if found.difference(also) != names:
            parts = ", ".join(sorted(found)) or "nothing"
            raise UnknownLayersError(f"{path or 'the layer'} consists of {parts}")


def transformer_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers of a model that has one stack of them, by their paths, from the bottom.

    Raises:
        UnknownLayersError: there is no such stack, or more than one.
    """
    config: Any = model.config
    if config.is_encoder_decoder:
        raise UnknownLayersError("it has an encoder and a decoder")
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
        raise UnknownLayersError(f"it has {len(stacks)} stacks of {depth} layers with attention")
    [(path, stack)] = stacks.items()
    return {f"{path}.{index}": layer for index, layer in enumerate(stack)}


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
        UnknownLayersError: the layer has neither form of a feed-forward.
    """
    for name in FEED_FORWARDS:
        module = getattr(layer, name, None)
        if isinstance(module, nn.Module):
            return module
    if is_bert_like(layer):
        output = layer.output
        assert isinstance(output, nn.Module)
        return output
    raise UnknownLayersError(
        f"its layers ({type(layer).__name__}) have no feed-forward that is known"
    )


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
    return output[0] if isinstance(output, tuple) else output


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
