"""What the strict reader accepts and refuses of bottlenecks (what they compute: `test_wrapped`)."""

from typing import Any

import pytest
import torch

from worker.inference.engine.errors import AdapterFormatError
from worker.inference.engine.methods.bottleneck import read
from worker.inference.engine.params import ModuleShape
from worker.inference.engine.weights import BaseLinear

MINIMAL: dict[str, Any] = {
    "peft_type": "BOTTLENECK",
    "r": 2,
    "activation": "gelu",
    "target_modules": ["a.down_proj"],
    "norm_modules": ["a.norm"],
}
LINEAR, NORM = ModuleShape(5, 3), ModuleShape(3, 3, kind="norm", has_bias=True)


def base(path: str) -> BaseLinear:
    raise AssertionError("what is behind a layer does not depend on its weights")


def test_bottlenecks_are_as_wide_as_what_they_follow_and_norms_are_whole() -> None:
    config = read(MINIMAL)
    assert config.shapes("a.down_proj", LINEAR) == {
        "own_down.weight": [2, 3],
        "own_down.bias": [2],
        "own_up.weight": [3, 2],
        "own_up.bias": [3],
    }
    own = {"own_parameters.weight": [3], "own_parameters.bias": [3]}
    assert config.shapes("a.norm", NORM) == own
    change = config.change("a.norm", {"own_parameters.weight": torch.ones(3)}, base)
    assert set(change.tensors()) == {"weight"}
    assert config.targets("a.down_proj", LINEAR)
    assert config.targets("a.norm", NORM)
    assert not config.targets("b.norm", NORM)
    assert not config.targets("a.down_proj", NORM)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("n_experts", 4, "unsupported_feature"),
        ("activation", "cube", "unsupported_feature"),
        ("activation", None, "unsupported_feature"),
        ("modules_to_save", ["lm_head"], "unsupported_feature"),
        ("norm_modules", "all-linear", "bad_config"),
        ("r", 0, "bad_config"),
    ],
)
def test_what_is_not_served_is_refused_by_name(key: str, value: Any, reason: str) -> None:
    with pytest.raises(AdapterFormatError, match=key) as caught:
        read({**MINIMAL, key: value})
    assert caught.value.reason == reason
