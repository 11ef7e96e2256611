"""NEFTune (arXiv 2310.05914, algorithm 1): noise on the embeddings of the input while training."""

from typing import Any

import torch
from peft import PeftModel
from torch import nn

from worker.training.packed import layout


def add_embedding_noise(model: PeftModel, alpha: float) -> None:
    """Have uniform noise in ±alpha / √(L·D) added to a row of L embeddings of D numbers.

    Evaluations add none. The noise is drawn from torch's generator, so that a run that goes on from
    a checkpoint draws the same.
    """
    base: Any = model.get_base_model()

    def disturb(_: nn.Module, __: Any, embedded: torch.Tensor) -> torch.Tensor:
        if not model.training:
            return embedded
        n_tokens, width = embedded.shape[-2:]
        if layout.is_active():
            lengths = torch.tensor([end - start for start, end in layout.current().spans])
            sizes = torch.repeat_interleave(lengths, lengths).to(embedded.device)
        else:
            sizes = torch.full((n_tokens,), n_tokens, device=embedded.device)
        scale = alpha / torch.sqrt(sizes * width)[:, None]
        noise = torch.rand(embedded.shape, device=embedded.device).mul_(2).sub_(1).mul_(scale)
        return embedded + noise.to(embedded.dtype)

    embeddings: nn.Module = base.get_input_embeddings()
    embeddings.register_forward_hook(disturb)
