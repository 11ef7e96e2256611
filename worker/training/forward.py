"""How a batch goes through a causal language model: packed where that is proved, else padded.

Both give the same numbers within rounding. Packed is several times faster; padded works with every
model of the library.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import structlog
import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from models.domain.training import Precision
from worker.training.methods.base import DEFAULT_ADAPTER
from worker.training.model import autocast
from worker.training.objectives.base import IGNORED, Batch, LanguageForward, LossSum
from worker.training.packed import attention, layout
from worker.training.packed.attention import UnsupportedAttentionError
from worker.training.packed.head import (
    log_probabilities,
    summed_cross_entropies,
    summed_cross_entropy,
)
from worker.training.packed.layout import Layout, Segment
from worker.training.packed.rewire import rewire

log = structlog.get_logger(__name__)

NO_ADAPTER = ""
"""No adapter's name: a segment of it goes through the frozen weights alone."""

PROOF_LENGTHS = [5, 9, 2]
PROOF_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Largest relative difference of the hidden states of a packed and of a padded pass."""


_REFUSALS = (AttributeError, LookupError, TypeError, ValueError)
"""What models raise that do not take packed rows, or attention from outside."""


class UnsupportedModelError(RuntimeError):
    """Packed passes of this model are not its padded ones."""


class PaddedForward:
    """Rows side by side, right-padded; the modules' own forward passes under autocast."""

    pads = True

    def __init__(self, model: PeftModel, precision: Precision, device: str, pad_id: int) -> None:
        self._model = model
        self.autocast = partial(autocast, precision, device)
        self._pad_id = pad_id

    def cross_entropy(self, batch: Batch) -> LossSum:
        targets = side_by_side(batch.targets, batch.lengths, IGNORED)
        with self.autocast():
            logits = label_logits(self._model, targets != IGNORED, **self._inputs(batch))
            return loss_of(logits, targets[targets != IGNORED])

    def log_probs(self, batch: Batch) -> torch.Tensor:
        targets = side_by_side(batch.targets, batch.lengths, IGNORED)
        with self.autocast():
            logits = label_logits(self._model, targets != IGNORED, **self._inputs(batch))
        return -functional.cross_entropy(
            logits.float(), targets[targets != IGNORED], reduction="none"
        )

    def without_adapter(self) -> AbstractContextManager[None]:
        return _frozen(self._model)

    def logits(self, batch: Batch) -> torch.Tensor:
        """Return the logits [N, vocabulary] of the N targets in order."""
        targets = side_by_side(batch.targets, batch.lengths, IGNORED)
        with self.autocast():
            return label_logits(self._model, targets != IGNORED, **self._inputs(batch))

    def hidden_states(self, batch: Batch) -> torch.Tensor:
        """Return what the head reads, [T, D], padding left out."""
        inputs = self._inputs(batch)
        with self.autocast():
            output = _backbone(self._model)(**inputs, use_cache=False)
        hidden: torch.Tensor = output.last_hidden_state[inputs["attention_mask"].bool()]
        return hidden

    def _inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        ones = torch.ones_like(batch.input_ids)
        return {
            "input_ids": side_by_side(batch.input_ids, batch.lengths, self._pad_id),
            "attention_mask": side_by_side(ones, batch.lengths, 0),
        }


def side_by_side(values: torch.Tensor, lengths: list[int], fill: int) -> torch.Tensor:
    return pad_sequence(list(values.split(lengths)), batch_first=True, padding_value=fill)


class PackedForward:
    """Rows one after another in ``[1, T]``, with the packed modules.

    Args:
        model: Rewired, with its attention set to ``attention.NAME``.
        around: Makes the context that a pass runs in: autocast where some adapted modules keep
            their own forward pass, else nothing.
    """

    pads = False

    def __init__(
        self,
        model: PeftModel,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
        adapter: str = DEFAULT_ADAPTER,
    ) -> None:
        self._model = model
        self._around = around
        self._adapter = adapter
        self._head = _plain_head(model)
        self.mixes = self._head is not None and around is nullcontext
        """Whether batches of several adapters can share a pass: every module takes segments."""

    def for_adapter(self, adapter: str) -> "PackedForward":
        """Return the forward of another adapter of the same model."""
        return PackedForward(self._model, self._around, adapter)

    def cross_entropy(self, batch: Batch) -> LossSum:
        wanted = batch.targets != IGNORED
        targets = batch.targets[wanted]
        if self._head is None:
            with layout.active(Layout.of(batch.lengths, self._adapter)), self._around():
                logits = label_logits(self._model, wanted[None], **self._inputs(batch))
                return loss_of(logits, targets)
        hidden = self.hidden_states(batch)[wanted]
        return LossSum(*summed_cross_entropy(hidden, *self._head, targets))

    def log_probs(self, batch: Batch) -> torch.Tensor:
        wanted = batch.targets != IGNORED
        targets = batch.targets[wanted]
        if self._head is None:
            with layout.active(Layout.of(batch.lengths, self._adapter)), self._around():
                logits = label_logits(self._model, wanted[None], **self._inputs(batch))
            return -functional.cross_entropy(logits.float(), targets, reduction="none")
        return log_probabilities(self.hidden_states(batch)[wanted], *self._head, targets)

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        own = self._adapter
        self._adapter = NO_ADAPTER
        try:
            with _frozen(self._model):  # for the modules that keep PEFT's own pass
                yield
        finally:
            self._adapter = own

    def logits(self, batch: Batch) -> torch.Tensor:
        """Return the logits [N, vocabulary] of the N targets in order."""
        wanted = batch.targets != IGNORED
        if self._head is None:
            with layout.active(Layout.of(batch.lengths, self._adapter)), self._around():
                return label_logits(self._model, wanted[None], **self._inputs(batch))
        weight, bias = self._head
        hidden = self.hidden_states(batch)[wanted]
        return functional.linear(hidden.to(weight.dtype), weight, bias)

    def hidden_states(self, batch: Batch) -> torch.Tensor:
        """Return what the head reads, [T, D]."""
        return self._hidden_states(batch, Layout.of(batch.lengths, self._adapter))

    def _hidden_states(self, batch: Batch, rows: Layout) -> torch.Tensor:
        with layout.active(rows), self._around():
            output = _backbone(self._model)(**self._inputs(batch), use_cache=False)
        hidden: torch.Tensor = output.last_hidden_state.squeeze(0)
        return hidden

    def cross_entropies(
        self, batches: Sequence[Batch], owners: Sequence[tuple[str, torch.Generator]]
    ) -> list[LossSum]:
        """Send batches of several adapters through the model at once; their losses stay apart.

        Args:
            batches: One for each adapter.
            owners: The adapter of each, by PEFT's name, and where its dropout takes its seeds from.

        Raises:
            UnsupportedModelError: `mixes` is false.
        """
        if self._head is None or not self.mixes:
            raise UnsupportedModelError("Adapters cannot share a pass of this model.")
        ends = accumulate((len(batch.input_ids) for batch in batches), initial=0)
        segments = tuple(
            Segment(start, end, adapter, generator)
            for (start, end), (adapter, generator) in zip(pairwise(ends), owners, strict=True)
        )
        targets = torch.cat([batch.targets for batch in batches])
        whole = Batch(
            torch.cat([batch.input_ids for batch in batches]),
            targets,
            [length for batch in batches for length in batch.lengths],
        )
        wanted = targets != IGNORED
        sizes = [int((batch.targets != IGNORED).sum()) for batch in batches]
        hidden = self._hidden_states(whole, Layout(whole.lengths, segments))[wanted]
        sums = summed_cross_entropies(hidden, *self._head, targets[wanted], sizes)
        return [LossSum(loss, n_correct) for loss, n_correct in zip(*sums, strict=True)]

    @staticmethod
    def _inputs(batch: Batch) -> dict[str, torch.Tensor]:
        positions = torch.cat([torch.arange(length) for length in batch.lengths])
        return {
            "input_ids": batch.input_ids[None],
            "position_ids": positions.to(batch.input_ids.device)[None],
        }


def choose_forward(
    model: PeftModel, precision: Precision, device: str, pad_id: int, *, cache_weights: bool
) -> tuple[LanguageForward, str | None]:
    """Rewire `model` for packed passes and prove them; return the way to train, and why padded.

    The proof compares the hidden states of three short rows, adapters included, with those of the
    model's own padded pass.

    Args:
        model: In training mode, with its adapter attached.
        precision: How the base is held.
        device: Where it is.
        pad_id: Fills short rows of a padded batch.
        cache_weights: Keep NF4 weights dequantised in packed passes.

    Returns:
        The forward, and None or the reason why it is not the packed one.
    """
    padded = PaddedForward(model, precision, device, pad_id)
    base: Any = model.get_base_model()
    own_attention = base.config._attn_implementation
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), _visible_adapters(model):
            expected = padded.hidden_states(_proof_batch(model))
            attention.register()
            base.set_attn_implementation(attention.NAME)
            done = rewire(model, cache_weights=cache_weights)
            around = padded.autocast if done.missed else nullcontext
            packed = PackedForward(model, around, model.active_adapter)
            found = packed.hidden_states(_proof_batch(model))
            error = float((found.float() - expected.float()).norm() / expected.float().norm())
        if error > PROOF_TOLERANCE[expected.dtype]:
            raise UnsupportedModelError(f"packed rows differ by {error:.1e} from padded ones")
    except (UnsupportedModelError, UnsupportedAttentionError, *_REFUSALS) as error:
        base.set_attn_implementation(own_attention)
        return padded, f"{type(error).__name__}: {error}"
    finally:
        model.train(was_training)
    log.info(
        "packed_forward",
        groups=done.n_groups,
        norms=done.n_norms,
        fused=done.n_fused,
        missed=len(done.missed),
    )
    return packed, None


def _proof_batch(model: PeftModel) -> Batch:
    vocabulary = int(model.get_base_model().config.vocab_size)  # type: ignore[union-attr,arg-type]
    generator = torch.Generator().manual_seed(0)
    n_ids = sum(PROOF_LENGTHS)
    ids = torch.randint(vocabulary, (n_ids,), generator=generator).to(model.device)
    return Batch(ids, torch.full_like(ids, IGNORED), PROOF_LENGTHS)


@contextmanager
def _frozen(model: PeftModel) -> Iterator[None]:
    """Switch the adapter and every dropout off for a while."""
    was_training = model.training
    model.eval()
    try:
        with model.disable_adapter():
            yield
    finally:
        model.train(was_training)


@contextmanager
def _visible_adapters(model: PeftModel) -> Iterator[None]:
    """Give fresh adapters, whose B is 0, an effect for a while; every bit of them comes back."""
    kept = {each: each.detach().clone() for each in model.parameters() if each.requires_grad}
    generator = torch.Generator().manual_seed(1)
    for parameter, value in kept.items():
        noise = torch.randn(value.shape, generator=generator).mul_(0.02)
        parameter.copy_(value + noise.to(value.device, value.dtype))
    try:
        yield
    finally:
        for parameter, value in kept.items():
            parameter.copy_(value)


def label_logits(model: PeftModel, wanted: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
    """Return logits [N, vocabulary] for the N positions where `wanted` is true, in row-major order.

    The head is the most expensive layer of a small model, and most positions have no target
    (specs: training, section 2). Cutting its *input* keeps whatever a model does to its logits
    after the head (scaling, soft caps), because all of that is element-wise.
    """
    base: Any = model.get_base_model()
    head = base.get_output_embeddings()
    assert isinstance(head, nn.Module)

    def keep_wanted(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        return (args[0][wanted].unsqueeze(0),)

    hook = head.register_forward_pre_hook(keep_wanted)
    try:
        output = model(**inputs, use_cache=False)
    finally:
        hook.remove()
    logits: torch.Tensor = output.logits[0]
    return logits


def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> LossSum:
    logits = logits.float()
    loss = functional.cross_entropy(logits, targets, reduction="sum")
    return LossSum(loss, (logits.detach().argmax(-1) == targets).sum())


def _backbone(model: PeftModel) -> nn.Module:
    """Return the part of the base below its head."""
    base: Any = model.get_base_model()
    backbone: nn.Module = getattr(base, base.base_model_prefix)
    return backbone


def _plain_head(model: PeftModel) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Return weight and bias of the head if the logits are nothing but its product."""
    base: Any = model.get_base_model()
    head = base.get_output_embeddings()
    if type(head) is not nn.Linear or head.weight.requires_grad:
        return None
    ids = torch.arange(4, device=model.device)[None]
    with torch.no_grad():
        hidden = _backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
        logits = base(input_ids=ids, use_cache=False).logits
        same = torch.allclose(head(hidden).float(), logits.float(), rtol=1e-3, atol=1e-3)
    return (head.weight, head.bias) if same else None
