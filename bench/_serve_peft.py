"""What peft offers for many adapters: ``adapter_names`` in one ``generate``, and taking turns."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase


class PeftLoops:
    """A base with adapters on it through peft.

    Args:
        base: What the adapters go on; it is changed.
        tokenizer: Of the base.
        adapters: A directory each.
        output_tokens: How many tokens each request gets.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        adapters: Sequence[Path],
        output_tokens: int,
    ) -> None:
        first, *others = adapters
        self._model: Any = PeftModel.from_pretrained(base, str(first), adapter_name=first.name)
        for other in others:
            self._model.load_adapter(str(other), other.name)
        self._model.eval()
        self._names = [each.name for each in adapters]
        self._tokenizer: Any = tokenizer
        self._output_tokens = output_tokens

    def mixed(self, prompts: Sequence[str]) -> float:
        """Return output tokens a second of one batch in which each row names its adapter."""
        names = [self._names[i % len(self._names)] for i in range(len(prompts))]
        return self._rate(prompts, adapter_names=names)

    def in_turn(self, prompts: Sequence[str]) -> float:
        """Return output tokens a second of one request after the other, each with its adapter."""
        seconds = 0.0
        for index, prompt in enumerate(prompts):
            started = time.perf_counter()
            self._model.set_adapter(self._names[index % len(self._names)])
            seconds += time.perf_counter() - started
            seconds += self._output_tokens / self._rate([prompt])
        return len(prompts) * self._output_tokens / seconds

    def _rate(self, prompts: Sequence[str], **options: Any) -> float:
        self._tokenizer.padding_side = "left"
        batch = self._tokenizer(list(prompts), return_tensors="pt", padding=True)
        started = time.perf_counter()
        with torch.inference_mode():
            output = self._model.generate(
                **batch,
                max_new_tokens=self._output_tokens,
                min_new_tokens=self._output_tokens,
                do_sample=False,
                **options,
            )
        seconds = time.perf_counter() - started
        n_tokens = output.shape[1] - batch["input_ids"].shape[1]
        return len(prompts) * n_tokens / seconds
