"""Stochastic routing to experts, their mean, and the loss that keeps them alike (AdaMix).

arXiv 2205.12410. A training pass goes through one expert of each layer, drawn uniformly; an
evaluation goes through their mean, which is what is stored.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional

from worker.training.objectives.base import IGNORED, Batch, LanguageForward, LossSum


class Experts(nn.Module):
    """M linear maps of one shape: `weight` [M, out, in], `bias` [M, out] or None.

    Raises:
        ValueError: the maps differ in shape.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        if len({layer.weight.shape for layer in layers}) != 1:
            raise ValueError("Experts of one layer have one shape.")
        self.in_features, self.out_features = layers[0].in_features, layers[0].out_features
        self.weights = nn.Parameter(torch.stack([layer.weight.detach() for layer in layers]))
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self.biases = nn.Parameter(torch.stack(biases)) if biases else None

    @property
    def weight(self) -> torch.Tensor:
        """The mean of the experts' weights, [out, in]."""
        return self.weights.mean(0)

    @property
    def bias(self) -> torch.Tensor | None:
        return None if self.biases is None else self.biases.mean(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return functional.linear(x, self.weight, self.bias)
        chosen = int(torch.randint(len(self.weights), ()))
        bias = None if self.biases is None else self.biases[chosen]
        return functional.linear(x, self.weights[chosen], bias)


def split_into_experts(model: PeftModel, n_experts: int, seed: int, adapter: str) -> None:
    """Give the A of every LoRA layer `n_experts` independent starts: U(−1/√d_in, 1/√d_in)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for module in model.modules():
            if not isinstance(module, LoraLayer) or adapter not in module.lora_A:
                continue
            single = module.lora_A[adapter]
            assert isinstance(single, nn.Linear)
            size = single.in_features, single.out_features
            layers = [
                nn.Linear(*size, bias=False, device=single.weight.device) for _ in range(n_experts)
            ]
            for layer in layers:
                nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
            module.lora_A[adapter] = Experts(layers)


def means_of_experts(trained: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors by name with the experts of `Experts` modules averaged, weights and biases."""
    found = {}
    for name, tensor in trained.items():
        path, _, last = name.rpartition(".")
        is_expert = last in ("weights", "biases")
        single = {"weights": "weight", "biases": "bias"}.get(last, last)
        found[f"{path}.{single}"] = tensor.mean(0) if is_expert else tensor
    return found


class ConsistentForward:
    """Two passes in training, each with routing and dropout of its own (section 3.2, equation 7).

    The loss is the cross-entropy of the first pass and, times `weight`,
    ½ (KL(p ‖ q) + KL(q ‖ p)) of the distributions of both, summed over the trained tokens. The
    target of each divergence is detached, as in the released code.

    Args:
        model: Whose `training` says whether a pass is one of training.
        forward: Of one pass.
        weight: Of the divergence.
    """

    def __init__(self, model: nn.Module, forward: LanguageForward, weight: float) -> None:
        self._model = model
        self._forward = forward
        self._weight = weight
        self.pads = forward.pads

    def logits(self, batch: Batch) -> torch.Tensor:
        return self._forward.logits(batch)

    def log_probs(self, batch: Batch) -> torch.Tensor:
        return self._forward.log_probs(batch)

    def without_adapter(self) -> AbstractContextManager[None]:
        return self._forward.without_adapter()

    def __getattr__(self, name: str) -> Any:
        """Give what only some forwards have: an encoder's outputs, vectors, vocabulary."""
        return getattr(self._forward, name)

    def disagreement(self, batch: Batch, outputs: torch.Tensor) -> torch.Tensor | float:
        """Return the consistency term of a classifier whose first pass gave `outputs` [N, C]."""
        if not self._model.training:
            return 0.0
        return self._weight * divergence(outputs, self.outputs(batch))

    def cross_entropy(self, batch: Batch) -> LossSum:
        if not self._model.training:
            return self._forward.cross_entropy(batch)
        first, second = (self._forward.logits(batch) for _ in range(2))
        targets = batch.targets[batch.targets != IGNORED]
        loss = functional.cross_entropy(first.float(), targets, reduction="sum")
        n_correct = (first.detach().argmax(-1) == targets).sum()
        return LossSum(loss + self._weight * divergence(first, second), n_correct)


def divergence(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return ½ Σ (KL(p ‖ q) + KL(q ‖ p)) in nats of logits [N, V]; gradients reach both."""
    p, q = first.float().log_softmax(-1), second.float().log_softmax(-1)
    one = functional.kl_div(p, q.detach(), reduction="sum", log_target=True)
    other = functional.kl_div(q, p.detach(), reduction="sum", log_target=True)
    return (one + other) / 2
