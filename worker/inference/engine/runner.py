"""Forward passes: prompts, several whole ones or a piece of one; one token for all that decode."""

import inspect

import torch
from transformers import DynamicCache, PreTrainedModel

from worker.inference.engine.blocks import root_of
from worker.inference.engine.caches import joined, row_of
from worker.inference.engine.fused_layer import fuse_
from worker.inference.engine.graphs import DecodeGraphs, Record
from worker.inference.engine.lora import BaseLayers
from worker.inference.engine.packed_linear import settle_
from worker.inference.engine.prefix import BLOCK_TOKENS, PrefixStore
from worker.inference.engine.prompts import together
from worker.inference.engine.row_attention import use_compiled_attention_
from worker.inference.engine.row_cache import RowCache, View, can_share_rows
from worker.inference.engine.scheduler import Limits
from worker.inference.engine.sequence import Sequence
from worker.inference.engine.slots import Slots
from worker.inference.engine.weights import AdapterWeights
from worker.kernels.operators import compile_, is_supported


def cache_argument(model: PreTrainedModel) -> str:
    """Return what `model` calls its key-value cache: it was renamed in transformers 5.

    Raises:
        ValueError: it takes none. Models ignore arguments that they do not know, so that every
            token would be answered as if nothing stood before it.
    """
    parameters = inspect.signature(type(model).forward).parameters
    for name in ("cache", "past_key_values"):
        if name in parameters:
            return name
    raise ValueError(f"{type(model).__name__} takes no key-value cache.")


class Runner:
    """The model, the adapters' slots and the caches; only the engine's thread calls it.

    Args:
        model: A causal language model in evaluation mode; its linear layers get wrapped.
        fingerprint: What identifies the model, for the roots of prefixes.
        limits: How many adapters take part at a time, and how much of prompts is kept.
        record: Makes steps of decoding such that are played again; None: each is a pass of its own.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        fingerprint: str,
        limits: Limits,
        record: Record | None = None,
    ) -> None:
        self.model = model
        self.layers = BaseLayers(model)
        on_cpu = model.device.type == "cpu"
        compiled = model.dtype if on_cpu and not record and is_supported(model.dtype) else None
        if compiled is not None:
            compile_(compiled)
            use_compiled_attention_(model)
        # Other products of a few rows take half as long in float32 there as in bfloat16.
        dtype = torch.float32 if on_cpu else model.dtype
        like = torch.empty(0, dtype=dtype, device=model.device)
        self.slots = Slots(self.layers.shapes, limits.n_slots, like, compiled)
        self.layers.attach(self.slots)
        if compiled is not None:
            fuse_(self.layers.transformer_layers, self.slots)
            settle_(model)
        self.decoding: list[Sequence] = []
        """Those that share a pass; its index is the row."""
        self._cache_argument = cache_argument(model)
        n_reserved = limits.max_running if record else 0
        self._rows = RowCache(n_reserved, limits.cache_tokens, compiled=compiled is not None)
        self._graphs = record and DecodeGraphs(
            self._step, self._rows, self.slots, record, model.dtype
        )
        self._fingerprint = fingerprint
        self.n_prompt = 0
        """Prompt tokens of the sequences that began, and those of them that were stored."""
        self.n_cached = 0
        # Prefixes are kept by their tokens, and virtual ones would shift them in the cache.
        has_virtual = bool(getattr(model, "n_virtual_tokens", 0))
        self._prefixes = PrefixStore(0 if has_virtual else limits.prefix_tokens)
        parameters = inspect.signature(type(model).forward).parameters
        self._shares_rows = can_share_rows(model.config, parameters)

    @torch.inference_mode()
    def feed(self, sequence: Sequence, n_tokens: int) -> torch.Tensor | None:
        """Feed the next pending tokens; return the logits [vocabulary] once all are fed."""
        cache = sequence.cache or self._start(sequence)
        chunk = sequence.tokens[sequence.n_fed : sequence.n_fed + n_tokens]
        self.slots.use([_weights(sequence)])
        output = self.model(
            input_ids=torch.tensor([chunk], device=self.model.device),
            use_cache=True,
            logits_to_keep=0 if sequence.scores_prompt else 1,
            **{self._cache_argument: cache},
        )
        if sequence.scores_prompt:
            sequence.score(output.logits[0])
        sequence.n_fed += len(chunk)
        if sequence.n_pending:
            return None
        sequence.scores_prompt = False
        if self._shares_rows:
            self._prefixes.save(self._root(sequence), sequence.tokens, cache)
        logits: torch.Tensor = output.logits[0, -1]
        return logits

    def next_prompts(self, waiting: list[tuple[Sequence, int]]) -> list[Sequence]:
        """Return which of `waiting`, with what each may be fed, to feed next: see `together`."""
        if not self._shares_rows:
            return [waiting[0][0]]
        return together(waiting, self._n_stored, BLOCK_TOKENS)

    def _n_stored(self, sequence: Sequence) -> int:
        return self._prefixes.n_stored(self._root(sequence), sequence.tokens)

    @torch.inference_mode()
    def feed_whole(self, sequences: list[Sequence]) -> torch.Tensor:
        """Feed all pending tokens of `sequences` in one pass; return logits [n, vocabulary].

        They go on from equally many tokens. Shorter ones are padded at their ends, which nothing
        before sees.
        """
        caches = [sequence.cache or self._start(sequence) for sequence in sequences]
        behind = sequences[0].n_fed
        lengths = [sequence.n_pending for sequence in sequences]
        ids = torch.zeros(len(sequences), max(lengths), dtype=torch.long)
        for row, sequence in enumerate(sequences):
            ids[row, : lengths[row]] = torch.tensor(sequence.tokens[behind:])
        config = self.model.config
        cache = joined(caches, config) if behind else DynamicCache(config=config)
        ends = sorted(set(lengths))
        adapters = [_weights(sequence) for sequence in sequences]
        self.slots.use(adapters)
        output = self.model(
            input_ids=ids.to(self.model.device),
            use_cache=True,
            logits_to_keep=torch.tensor(ends, device=self.model.device) - 1,
            **{self._cache_argument: cache},
        )
        own = [row_of(cache, row, each.n_tokens, config) for row, each in enumerate(sequences)]
        for sequence, cache in zip(sequences, own, strict=True):
            sequence.cache, sequence.n_fed = cache, sequence.n_tokens
            self._prefixes.save(self._root(sequence), sequence.tokens, cache)
        at = [ends.index(length) for length in lengths]
        logits: torch.Tensor = output.logits[range(len(sequences)), at]
        return logits

    def _start(self, sequence: Sequence) -> DynamicCache:
        """Give a sequence a cache, with what is stored of its prompt in it."""
        cache, n_cached = DynamicCache(config=self.model.config), 0
        if self._shares_rows and not sequence.scores_prompt:
            n_cached = self._prefixes.load(self._root(sequence), sequence.tokens, cache)
        sequence.cache, sequence.n_fed = cache, n_cached
        if sequence.n_cached is None:
            sequence.n_cached = n_cached
            self.n_prompt += sequence.n_tokens
            self.n_cached += n_cached
        return cache

    def _root(self, sequence: Sequence) -> bytes:
        return root_of(self._fingerprint, sequence.adapter)

    def seat(self, sequence: Sequence) -> None:
        """Give a sequence whose prompt is done a row, where the model allows it."""
        if self._shares_rows and sequence.cache is not None:
            self._rows.append(sequence.cache)
            self.decoding.append(sequence)
            sequence.has_row, sequence.cache = True, None

    def leave(self, sequence: Sequence) -> None:
        """Drop the row or the cache of a sequence; it starts from its first token again."""
        if sequence.has_row:
            row = self.decoding.index(sequence)
            self._rows.remove(row)
            self.decoding[row] = self.decoding[-1]
            self.decoding.pop()
        sequence.restart()

    @torch.inference_mode()
    def decode(self, rows: slice) -> torch.Tensor:
        """Feed the pending token of each of `rows`; return their logits [rows, vocabulary].

        Nothing has happened when it raises: what a broken pass wrote is overwritten by the next.
        """
        sequences = self.decoding[rows]
        tokens = [sequence.tokens[-1] for sequence in sequences]
        adapters = [_weights(sequence) for sequence in sequences]
        logits = None
        if self._graphs is not None and len(sequences) == len(self.decoding):
            logits = self._graphs.decode(tokens, adapters)
        if logits is None:
            view = self._rows.feed(rows, self.model.dtype)
            self.slots.use(adapters)
            logits = self._step(torch.tensor(tokens, device=self.model.device)[:, None], view)
        self._rows.advance(rows)
        for sequence in sequences:
            sequence.n_fed += 1
        return logits

    def _step(self, tokens: torch.Tensor, view: View) -> torch.Tensor:
        """Feed `tokens` [n, 1] to the rows of `view`; return their logits [n, vocabulary]."""
        cache, positions, mask = view
        output = self.model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=mask,
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_argument: cache},
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits


def _weights(sequence: Sequence) -> AdapterWeights | None:
    return None if sequence.lease is None else sequence.lease.weights
