"""Virtual tokens before every row: vectors in the place of embeddings, or keys and values.

PEFT has them in its own forward pass alone. Here they are put before the backbone, so that they
are seen by whatever is computed with it: losses on chosen tokens, hidden states, and the engine,
whose cache then begins with them. The parameters and the file are PEFT's.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, PeftModelForCausalLM
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from models.errors import InvalidRequestError
from worker.heads import head_paths
from worker.training.tuners.attach import without_known_warnings

VIRTUAL = "n_virtual_tokens"
"""Attribute of a base that has virtual tokens before every row: how many positions they take."""
PARAMETER, STORED = "prompt_encoder.embedding.weight", "prompt_embeddings"
"""The one parameter of an adapter: in the model, without the adapter's name, and in its file."""


@dataclass(frozen=True, slots=True)
class Virtual:
    """Virtual tokens: `embeddings` [n, width], or `states` [n, layers, 2, heads, size]."""

    embeddings: torch.Tensor | None = None
    states: torch.Tensor | None = None

    @property
    def n_tokens(self) -> int:
        values = self.embeddings if self.states is None else self.states
        assert values is not None
        return len(values)


class VirtualModel(PeftModelForCausalLM):
    """PEFT's model of prompt or prefix tuning; its base sees the virtual tokens of the adapter."""

    def __init__(self, model: nn.Module, config: PeftConfig, adapter: str, **options: Any) -> None:
        super().__init__(model, config, adapter, **options)
        put_before(self.get_base_model(), self._virtual)
        kind: Any = config.peft_type
        self.passes_cache = kind.value == "PREFIX_TUNING"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)

    def _virtual(self) -> Virtual | None:
        return None if self._adapters_disabled else virtual_of(self, str(self.active_adapter))


def attach_virtual(
    model: PreTrainedModel | PeftModel,
    config: PeftConfig,
    seed: int,
    adapter: str,
    start: Callable[[PeftModel, torch.Tensor], torch.Tensor],
) -> PeftModel:
    """Put trainable virtual tokens before a causal language model.

    Args:
        model: A base.
        config: Of prompt or prefix tuning.
        seed: Of the first values.
        adapter: PEFT's name of what is added.
        start: Gives the first values of the parameter from drawn token ids [n].

    Raises:
        InvalidRequestError: the base has a new head, or other adapters.
    """
    if isinstance(model, PeftModel) or head_paths(model):
        raise InvalidRequestError(
            "peft.type: virtual tokens have no place for a new head or other adapters. Choose "
            "another method, e.g. 'lora'.",
            param="peft.type",
            code="unsupported_combination",
        )
    with torch.random.fork_rng(), without_known_warnings():
        torch.manual_seed(seed)
        base, settings = cast("Any", model), cast("Any", config)
        vocabulary = int(base.config.get_text_config().vocab_size)
        drawn = torch.randint(vocabulary, (settings.num_virtual_tokens,)).to(base.device)
        adapted: Any = VirtualModel(model, config, adapter)
        with torch.no_grad(), adapted.disable_adapter():
            first = start(adapted, drawn)
        adapted.prompt_encoder[adapter].embedding.weight = nn.Parameter(first.float().clone())
    made: PeftModel = adapted
    return made


def embeddings_of(model: PeftModel, ids: torch.Tensor) -> torch.Tensor:
    """Return the base's own embeddings [n, width] of tokens."""
    base: Any = model.get_base_model()
    found: torch.Tensor = base.get_input_embeddings()(ids)
    return found


def states_of(model: PeftModel, ids: torch.Tensor) -> torch.Tensor:
    """Return the base's keys and values of a text, flat as PEFT has them: [n, layers·2·heads·size].

    A prefix that starts there is the text's own, whatever scale the keys of the base have.
    """
    base: Any = model.get_base_model()
    name = _cache_name(base)
    cache: Any = DynamicCache(config=base.config)
    was_training = base.training
    base.eval()(input_ids=ids[None], use_cache=True, **{name: cache})
    base.train(was_training)
    layers = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
    # [layers, 2, heads, n, size] -> [n, layers, 2, heads, size]
    return torch.stack(layers).permute(3, 0, 1, 2, 4).flatten(1)


def virtual_of(model: PeftModel, adapter: str) -> Virtual:
    """Return the virtual tokens of an adapter of PEFT's; gradients reach its parameter."""
    whole: Any = model
    config, weight = whole.peft_config[adapter], whole.prompt_encoder[adapter].embedding.weight
    if config.peft_type.value == "PROMPT_TUNING":
        return Virtual(embeddings=weight)
    heads = config.num_attention_heads
    return Virtual(states=weight.unflatten(1, (config.num_layers, 2, heads, -1)))


def with_virtual_tokens(loaded: PeftModel) -> PreTrainedModel:
    """Return the base of a model that PEFT has loaded, with its virtual tokens for good."""
    [adapter] = loaded.peft_config
    encoders: Any = loaded.prompt_encoder
    for parameter in encoders.parameters():
        parameter.requires_grad_(False)
    kept = virtual_of(loaded, adapter)
    base: Any = loaded.get_base_model()
    put_before(base, lambda: kept)
    setattr(base, VIRTUAL, kept.n_tokens)
    prepared: PreTrainedModel = base
    return prepared


def put_before(base: nn.Module, source: Callable[[], Virtual | None]) -> None:
    """Let every row that `base` reads from its start begin with the virtual tokens of `source`.

    A pass with a cache that holds tokens already goes on from there; the outputs are those of the
    real tokens alone.
    """
    model: Any = base
    backbone = getattr(model, model.base_model_prefix)
    name = _cache_name(backbone)
    n_added = 0

    def before(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        nonlocal n_added
        n_added = 0
        tokens, cache = source(), kwargs.get(name)
        if tokens is None or (cache is not None and cache.get_seq_length()):
            return None
        if kwargs.get("position_ids") is not None:
            raise ValueError("virtual tokens come before rows that stand side by side only")
        kwargs = dict(kwargs)
        ids = args[0] if args else kwargs.pop("input_ids")
        rows, mask = ids.shape[0], kwargs.get("attention_mask")
        if mask is not None:
            ones = mask.new_ones(rows, tokens.n_tokens)
            kwargs["attention_mask"] = torch.cat([ones, mask], 1)
        real = model.get_input_embeddings()(ids)
        if tokens.embeddings is not None:
            n_added = tokens.n_tokens
            virtual = tokens.embeddings.to(real).expand(rows, -1, -1)
            return (), kwargs | {"inputs_embeds": torch.cat([virtual, real], 1)}
        assert tokens.states is not None
        # [n, layers, 2, heads, size] -> [layers, 2, rows, heads, n, size]
        states = tokens.states.to(real).permute(1, 2, 3, 0, 4)[:, :, None]
        states = states.expand(-1, -1, rows, -1, -1, -1)
        if cache is None:
            kwargs[name] = Cache(layers=[_Before(*layer) for layer in states])
        else:
            for index, (keys, values) in enumerate(states):
                cache.update(keys, values, index)
        return (), kwargs | {"input_ids": ids}

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if n_added:
            output.last_hidden_state = output.last_hidden_state[:, n_added:]
        return output

    backbone.register_forward_pre_hook(before, with_kwargs=True)
    backbone.register_forward_hook(after)


class _Before(CacheLayerMixin):
    """Keys and values before those of one pass; nothing is kept of the pass."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: what comes before is there."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.keys is not None
        assert self.values is not None
        keys = torch.cat([self.keys.to(key_states), key_states], 2)
        return keys, torch.cat([self.values.to(value_states), value_states], 2)

    def get_seq_length(self) -> int:
        assert self.keys is not None
        return self.keys.shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


def _cache_name(model: nn.Module) -> str:
    """Return what a model calls its key-value cache: it was renamed in transformers 5."""
    parameters = inspect.signature(type(model).forward).parameters
    return next(name for name in ("cache", "past_key_values") if name in parameters)
