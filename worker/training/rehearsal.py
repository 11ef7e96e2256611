"""What a waiting trainer does before its job comes: it attaches an adapter and makes one pass.

The job that comes next most often wants what the last one had. Its adapter is then on the model
already and needs only the first weights of its own seed; the packed pass is proved, its kernels are
chosen, its memory is in the heap, and what a pass keeps has been counted.
"""

from dataclasses import dataclass

import structlog
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from models.domain.base import JsonObject
from models.domain.training import Precision
from worker.training import methods
from worker.training.forward import PackedForward, choose_forward
from worker.training.memory import PassMemory, can_cache_weights
from worker.training.methods.base import Method, MethodParams
from worker.training.model import adapt, trainable_parameters
from worker.training.objectives.base import Batch
from worker.training.packed.rewire import undo

log = structlog.get_logger(__name__)

LENGTHS = [128, 96, 64, 64]
"""Tokens of the rows of the pass."""


@dataclass(frozen=True, slots=True)
class Rehearsed:
    """A model with an adapter that has not learned, the proved way through it, what a pass keeps.

    `attention` is the base's own, by transformers' name.
    """

    model: PeftModel
    forward: PackedForward
    method: Method
    params: MethodParams
    memory: PassMemory
    attention: str

    def draw(self, seed: int) -> None:
        """Give the adapter the first weights of `seed`."""
        self.method.redraw(self.model, self.params, seed)

    def strip(self) -> PreTrainedModel:
        """Return the base as it was, without the adapter."""
        return _strip(self.model, self.attention)


def rehearse(
    base: PreTrainedModel, precision: Precision, peft: JsonObject, device: str, pad_id: int
) -> Rehearsed | PreTrainedModel:
    """Prepare a base for a job with the parameters `peft`; return the base itself if it cannot be.

    Args:
        base: As it was loaded; with a language-model head.
        precision: How it is held.
        peft: A method and its parameters.
        device: Where the base is.
        pad_id: Fills short rows of a padded batch.

    Raises:
        InvalidRequestError: the parameters do not fit the base.
    """
    params, method = methods.parse_params(peft), methods.get_method(peft["type"])
    attention: str = base.config._attn_implementation
    model = adapt(base, method, params, seed=0)
    if not _can_redraw(model, method, params):
        log.info("not_rehearsed", reason="its first weights cannot be drawn again")
        return _strip(model, attention)
    cache = can_cache_weights(model, device)
    forward, reason = choose_forward(model, precision, device, pad_id, cache_weights=cache)
    if not isinstance(forward, PackedForward):
        log.info("not_rehearsed", reason=reason)
        return _strip(model, attention)
    memory = _pass(model, forward, device)
    log.info("rehearsed", method=peft["type"])
    return Rehearsed(model, forward, method, params, memory, attention)


def _can_redraw(model: PeftModel, method: Method, params: MethodParams) -> bool:
    """Prove that weights drawn anew are those that attaching the adapter draws, bit for bit."""
    parameters = trainable_parameters(model)
    attached = {name: each.detach().clone() for name, each in parameters.items()}
    if not method.redraw(model, params, seed=1) or not method.redraw(model, params, seed=0):
        return False
    return all(torch.equal(each, attached[name]) for name, each in parameters.items())


def _pass(model: PeftModel, forward: PackedForward, device: str) -> PassMemory:
    """Make a training pass over random rows, of which nothing stays; return what it kept."""
    vocabulary = int(model.get_base_model().config.vocab_size)  # type: ignore[union-attr,arg-type]
    ids = torch.randint(vocabulary, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0)).to(
        device
    )
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with torch.random.fork_rng():
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = forward.cross_entropy(Batch(ids, ids, LENGTHS)).loss
        loss.backward()
    model.zero_grad(set_to_none=True)
    return PassMemory(sum(LENGTHS), max(LENGTHS), sum(kept.values()))


def _strip(model: PeftModel, attention: str) -> PreTrainedModel:
    undo(model)
    base: PreTrainedModel = model.unload()
    base.set_attn_implementation(attention)
    return base
