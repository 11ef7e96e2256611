"""What the strict reader accepts and refuses of IA3 (what it computes: `test_runner`)."""

from typing import Any

import pytest
import torch

from worker.inference.engine.errors import AdapterFormatError
from worker.inference.engine.methods.ia3 import Ia3Config, read
from worker.inference.engine.params import ModuleShape
from worker.inference.engine.weights import BaseLinear

SHAPE = ModuleShape(3, 2)
MINIMAL: dict[str, Any] = {
    "peft_type": "IA3",
    "target_modules": ["k_proj", "down_proj"],
    "feedforward_modules": ["down_proj"],
}


def base(path: str) -> BaseLinear:
    return BaseLinear(torch.ones(2, 3), None)


def test_feed_forward_layers_are_rescaled_where_they_read_and_others_where_they_write() -> None:
    config = read(MINIMAL)
    assert config.shapes("a.down_proj", SHAPE) == {"ia3_l": [1, 3]}
    assert config.shapes("a.k_proj", SHAPE) == {"ia3_l": [2, 1]}
    change = config.change("a.down_proj", {"ia3_l": torch.full((1, 3), 2.0)}, base)
    assert set(change.tensors()) == {"gain_in"}
    change = config.change("a.k_proj", {"ia3_l": torch.full((2, 1), 2.0)}, base)
    assert set(change.tensors()) == {"gain"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("modules_to_save", ["lm_head"]),
        ("exclude_modules", ["k_proj"]),
        ("target_modules", ".*k_proj"),
        ("feedforward_modules", ".*down_proj"),
        ("a_key_of_the_future", 1),
    ],
)
def test_a_feature_that_is_not_served_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(AdapterFormatError, match=key) as caught:
        read({**MINIMAL, key: value})
    assert caught.value.reason == "unsupported_feature"


@pytest.mark.parametrize(
    ("key", "value"), [("target_modules", []), ("feedforward_modules", [1]), ("target_modules", 3)]
)
def test_a_value_of_the_wrong_kind_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(AdapterFormatError, match=key) as caught:
        read({**MINIMAL, key: value})
    assert caught.value.reason == "bad_config"


@pytest.mark.parametrize("absent", [None, []])
def test_without_feed_forward_modules_every_layer_is_rescaled_where_it_writes(absent: Any) -> None:
    config = read({**MINIMAL, "feedforward_modules": absent})
    assert config == Ia3Config(("k_proj", "down_proj"), ())
    assert config.shapes("a.down_proj", SHAPE) == {"ia3_l": [2, 1]}
