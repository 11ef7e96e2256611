"""MEFT as a tuner of PEFT: layers wrapped in two streams, small bottlenecks in F and G.

Tensors are named ``…layers.N.meft_KIND.{down,up}.{weight,bias}``, as PEFT names its own. The layers
of a model run together, in the call of the last one: those below only note what they were called
with.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from transformers import Cache
from transformers.activations import ACT2FN

from worker.training.dropout import BitDropout
from worker.training.packed import layout
from worker.training.reversible import blocks
from worker.training.reversible.blocks import Call
from worker.training.reversible.streams import Block, Coupling, Plan, run

PEFT_TYPE = "MEFT"
START_STD = 0.01
"""Half of the released code's: it starts nearer to the base."""
KINDS = {
    "meft1": ("feed_forward", "coupling"),
    "meft2": ("feed_forward", "coupling"),
    "meft3": ("attention", "feed_forward"),
}
"""The bottlenecks of a layer in each variant; the last layer of meft1 has no ``coupling``."""


def has_bottleneck(variant: str, kind: str, *, is_last: bool) -> bool:
    """Tell whether a layer has a bottleneck of this kind.

    In meft1 the G of the last layer would add to the stream that nothing reads any more.
    """
    return kind in KINDS[variant] and not (variant == "meft1" and kind == "coupling" and is_last)


@dataclass
class MeftConfig(PeftConfig):
    """``adapter_config.json`` of a MEFT adapter; λ is 2^-lambda_bits."""

    variant: str = "meft1"
    lambda_bits: int = 7
    r: int = 16
    activation: str = "gelu"
    dropout: float = 0.0
    target_modules: list[str] | set[str] | None = None
    modules_to_save: list[str] | None = None
    exclude_modules: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if self.variant not in KINDS:
            raise ValueError(f"Variant is {self.variant!r}; it must be one of {', '.join(KINDS)}.")
        if self.activation not in ACT2FN:
            raise ValueError(f"Activation {self.activation!r} is not one that transformers knows.")


class Bottleneck(nn.Module):
    """``up(f(down(x)))`` in float32, no residual: [.., D] to [.., D]; N(0, 0.01) at first."""

    def __init__(self, width: int, size: int, activation: str, dropout: float) -> None:
        super().__init__()
        self.down = nn.Linear(width, size)
        self.up = nn.Linear(size, width)
        self._activation = ACT2FN[activation]
        self._dropout = BitDropout(dropout) if dropout else nn.Identity()
        for linear in (self.down, self.up):
            nn.init.normal_(linear.weight, std=START_STD)
            nn.init.zeros_(linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self._dropout(self._activation(self.down(x.to(self.down.weight.dtype)))))


class Stack:
    """What the wrapped layers of one model share."""

    def __init__(self, call: Call, width: int, paths: Sequence[str]) -> None:
        self.layers: list[MeftLayer] = []
        self.paths = tuple(paths)
        self.configs: dict[str, MeftConfig] = {}
        self.width = width
        self.keeps_inputs = False
        self.last_plan: Plan | None = None
        """The newest pass; its `history` is what tests compare."""
        self.keeps_history = False
        self._form = call
        self._calls: list[Call] = []

    def take(
        self, index: int, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Note the call of a layer; in the last one's, run all of them."""
        if index == 0:
            self._calls = []
        elif len(self._calls) != index:
            raise RuntimeError(f"Layer {index} was called after {len(self._calls)} others.")
        if torch.is_grad_enabled() and any(
            isinstance(each, Cache) for each in (*args, *kwargs.values())
        ):
            raise RuntimeError("MEFT trains without a cache of keys and values: use_cache=False.")
        self._calls.append(Call(args, kwargs, self._form.n_outputs))
        if index == len(self.layers) - 1:
            calls, self._calls = self._calls, []
            hidden = self._run(hidden, calls)
        if self._form.n_outputs:
            return hidden, *[None] * (self._form.n_outputs - 1)
        return hidden

    def _run(self, hidden: torch.Tensor, calls: list[Call]) -> torch.Tensor:
        [adapter] = self.layers[0].active_adapters
        variant = self.configs[adapter].variant
        # A packed pass has its layout around it, and so must the way back.
        around = partial(layout.active, layout.current()) if layout.is_active() else nullcontext
        plan = Plan(
            [layer.coupling(adapter, call) for layer, call in zip(self.layers, calls, strict=True)],
            output=0 if variant == "meft2" else 1,
            keeps_inputs=self.keeps_inputs,
            around=around,
            history=[] if self.keeps_history else None,
        )
        self.last_plan = plan if self.keeps_history else None
        return run(plan, hidden)


class MeftLayer(nn.Module, BaseTunerLayer):
    """A Transformer layer that takes part in a `Stack`."""

    adapter_layer_names = ("meft_attention", "meft_feed_forward", "meft_coupling")
    other_param_names: tuple[str, ...] = ()

    def __init__(self, base_layer: nn.Module, stack: Stack, *, is_last: bool) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.meft_attention = nn.ModuleDict()
        self.meft_feed_forward = nn.ModuleDict()
        self.meft_coupling = nn.ModuleDict()
        self._is_last = is_last
        self._index = len(stack.layers)
        self._stack = stack
        stack.layers.append(self)

    def __getattr__(self, name: str) -> Any:
        """Models ask their layers for facts, such as the kind of attention."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def update_layer(self, adapter: str, config: MeftConfig) -> None:
        """Add the bottlenecks of `adapter`."""
        device = next(self.base_layer.parameters()).device
        for name in self.adapter_layer_names:
            if has_bottleneck(config.variant, name.removeprefix("meft_"), is_last=self._is_last):
                getattr(self, name)[adapter] = Bottleneck(
                    self._stack.width, config.r, config.activation, config.dropout
                ).to(device)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.disable_adapters:
            return self.base_layer(*args, **kwargs)
        hidden, *others = args if args else [kwargs.pop("hidden_states")]
        return self._stack.take(self._index, hidden, tuple(others), kwargs)

    def coupling(self, adapter: str, call: Call) -> Coupling:
        """Return the layer as F and G of one pass."""
        config = self._stack.configs[adapter]
        bits = config.lambda_bits
        layer = self.base_layer
        beside = partial(blocks.beside_feed_forward, layer)
        match config.variant:
            case "meft1":
                f = self._block(blocks.whole, call, beside, self.meft_feed_forward, adapter)
                return Coupling(f, self._adapter(adapter), bits, 0, swaps=True)
            case "meft2":
                g = self._block(blocks.whole, call, beside, self.meft_feed_forward, adapter)
                return Coupling(self._adapter(adapter), g, 0, bits, swaps=True)
            case _:
                after = partial(blocks.after_attention, layer)
                f = self._block(blocks.attention_block, call, after, self.meft_attention, adapter)
                g = self._block(
                    blocks.feed_forward_block, call, beside, self.meft_feed_forward, adapter
                )
                return Coupling(f, g, bits, bits, swaps=False)

    def _block(
        self,
        part: Callable[[nn.Module, Call, torch.Tensor], torch.Tensor],
        call: Call,
        around: Any,
        bottlenecks: nn.ModuleDict,
        adapter: str,
    ) -> Block:
        bottleneck = bottlenecks[adapter]

        def apply(x: torch.Tensor) -> torch.Tensor:
            with around(bottleneck):
                return part(self.base_layer, call, x)

        return Block(apply, _trained(bottleneck))

    def _adapter(self, adapter: str) -> Block | None:
        if adapter not in self.meft_coupling:
            return None
        bottleneck = self.meft_coupling[adapter]
        return Block(bottleneck, _trained(bottleneck))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError("A MEFT adapter cannot be merged: the base has one stream, it has two.")


def _trained(module: nn.Module) -> tuple[nn.Parameter, ...]:
    return tuple(each for each in module.parameters() if each.requires_grad)


class MeftModel(BaseTuner):
    """Wraps all Transformer layers of a model."""

    prefix = "meft_"
    tuner_layer_cls = MeftLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (as PEFT has it)
    stack: Stack

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        if not hasattr(self, "stack"):
            call, self._split_error = blocks.probe(model)
            width: int = model.config.hidden_size  # type: ignore[union-attr,assignment]
            self.stack = Stack(call, width, list(blocks.transformer_layers(model)))

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        if peft_config.variant == "meft3" and self._split_error is not None:
            raise self._split_error
        peft_config.target_modules = list(self.stack.paths)
        return peft_config

    def _check_target_module_exists(  # type: ignore[override]
        self, peft_config: Any, key: str
    ) -> bool:
        return key in self.stack.paths

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        *,
        current_key: str,
        **_: Any,
    ) -> None:
        self.stack.configs[adapter_name] = peft_config
        if isinstance(target, MeftLayer):
            target.update_layer(adapter_name, peft_config)
            return
        layer = MeftLayer(target, self.stack, is_last=current_key == self.stack.paths[-1])
        layer.update_layer(adapter_name, peft_config)
        self._replace_module(parent, target_name, layer, target)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Return a name as in the file; PEFT's own expects one part after the adapter's."""
        head, kind, rest = key.partition(cls.prefix)
        return head + kind + rest.replace(f".{adapter_name}.", ".", 1)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # PEFT's own would give the layer the weight of the one that it replaces, which has none.
        setattr(parent, child_name, new_module)


def activation_of(model: Any) -> str:
    """Return the non-linearity of the base's feed-forward by transformers' name.

    Raises:
        InvalidRequestError: its configuration names none.
    """
    config = (model.get_base_model() if isinstance(model, PeftModel) else model).config
    for name in ("hidden_act", "hidden_activation", "activation_function", "activation"):
        value = getattr(config, name, None)
        if isinstance(value, str) and value in ACT2FN:
            return value
    raise blocks.unsupported("its configuration names no activation function that is known")


def stack_of(model: nn.Module) -> Stack:
    """Return the stack of a model with a MEFT adapter; `LookupError` without one."""
    for module in model.modules():
        if isinstance(module, MeftModel):
            return module.stack
    raise LookupError("This model has no MEFT adapter.")


PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = MeftConfig  # type: ignore[index]
PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = MeftModel  # type: ignore[index]
PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = MeftModel.prefix  # type: ignore[index]
