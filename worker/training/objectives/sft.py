"""Supervised fine-tuning: mean cross-entropy over the trained tokens of an optimizer step."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from worker.training.objectives import register
from worker.training.objectives.base import Batch, Example, LossSum, Objective, ObjectiveParams

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

IGNORED = -100


class SftParams(ObjectiveParams):
    """Imitate the assistant's turns."""

    type: Literal["sft"] = "sft"


@register
class Sft(Objective):
    name: ClassVar[str] = "sft"
    Params: ClassVar[type[ObjectiveParams]] = SftParams
    forms: ClassVar[frozenset[str]] = frozenset({"chat", "completion", "text"})

    def collate(self, examples: Sequence[Example], pad_id: int, device: str) -> Batch:
        import torch

        shape = (len(examples), max(len(example.input_ids) for example in examples))
        input_ids = torch.full(shape, pad_id)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        targets = torch.full(shape, IGNORED)
        for index, example in enumerate(examples):
            # Copies: the arrays may be views of a file, which nobody may write to.
            ids = torch.from_numpy(example.input_ids.astype("int64"))
            trained = torch.from_numpy(example.trained.copy())
            n_ids = len(ids)
            input_ids[index, :n_ids] = ids
            attention_mask[index, :n_ids] = 1
            # The position before a trained token predicts it.
            targets[index, : n_ids - 1] = ids[1:].masked_fill(~trained[1:], IGNORED)
        return Batch(input_ids.to(device), attention_mask.to(device), targets.to(device))

    def loss(self, model: "PeftModel", batch: Batch, params: Any) -> LossSum:
        from torch.nn import functional

        logits = label_logits(model, batch).float()
        targets = batch.targets[batch.targets != IGNORED]
        loss = functional.cross_entropy(logits, targets, reduction="sum")
        n_correct = (logits.detach().argmax(-1) == targets).sum()
        return LossSum(loss, n_correct)


def label_logits(model: "PeftModel", batch: Batch) -> "torch.Tensor":
    """Return logits [N, vocabulary] for the N positions that have a target, in row-major order.

    The head is the most expensive layer of a small model, and most positions have no target
    (specs: training, section 2). Cutting its *input* keeps whatever a model does to its logits
    after the head (scaling, soft caps), because all of that is element-wise.
    """
    import torch

    wanted = batch.targets != IGNORED
    base: Any = model.get_base_model()
    head = base.get_output_embeddings()
    assert isinstance(head, torch.nn.Module)

    def keep_wanted(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        return (args[0][wanted].unsqueeze(0),)

    hook = head.register_forward_pre_hook(keep_wanted)
    try:
        output = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        )
    finally:
        hook.remove()
    logits: torch.Tensor = output.logits[0]
    return logits
