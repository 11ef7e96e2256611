"""The methods whose adapters share a batch, by PEFT's name; adding one is one file and one line."""

from collections.abc import Callable, Mapping
from typing import Any

from worker.inference.engine.methods import bottleneck, ia3, lora, meft
from worker.inference.engine.methods.base import Method

METHODS: Mapping[str, Callable[[Mapping[str, Any]], Method]] = {
    "LORA": lora.read,
    "IA3": ia3.read,
    "BOTTLENECK": bottleneck.read,
    "MEFT": meft.read,
}
