"""Activation checkpointing: layers keep their input only, and run again in the backward pass.

Arithmetic bought with memory (arXiv 1604.06174): one more forward pass of each layer, the same
numbers bit for bit. The loop turns it on when not even one row at a time fits.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from worker.training.packed import layout
from worker.training.packed.layout import Layout


def is_possible(model: nn.Module) -> bool:
    """Tell whether `model` has layers that can run again: not if they need a cache in training."""
    return not getattr(model, "passes_cache", False) and any(_layers(model))


def enable(model: nn.Module) -> None:
    """Make the layers of `model` keep nothing but their input while it trains, in place."""
    again: Callable[..., Any] = partial(checkpoint, use_reentrant=False, context_fn=_contexts)
    for layer in _layers(model):
        layer._gradient_checkpointing_func = again
        layer.gradient_checkpointing = True


def _layers(model: nn.Module) -> Iterator[Any]:
    yield from (each for each in model.modules() if isinstance(each, GradientCheckpointingLayer))


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return what surrounds the first pass, and what the second, long after its layout is gone."""
    if not layout.is_active():
        return nullcontext(), nullcontext()
    rows = layout.current()
    states = [
        (segment.generator, segment.generator.get_state())
        for segment in rows.segments
        if segment.generator is not None
    ]
    return nullcontext(), _again(rows, states)


@contextmanager
def _again(rows: Layout, states: list[tuple[torch.Generator, torch.Tensor]]) -> Iterator[None]:
    """Give the second pass the rows of the first, and the random numbers of their owners."""
    with ExitStack() as stack:
        for generator, state in states:
            stack.callback(generator.set_state, generator.get_state())
            generator.set_state(state)
        stack.enter_context(layout.active(rows))
        yield
