"""What the strict reader accepts and refuses of MEFT (what it computes: `test_wrapped`)."""

from typing import Any

import pytest

from worker.inference.engine.errors import AdapterFormatError
from worker.inference.engine.methods.meft import read
from worker.inference.engine.params import ModuleShape

MINIMAL: dict[str, Any] = {
    "peft_type": "MEFT",
    "variant": "meft1",
    "lambda_bits": 7,
    "r": 2,
    "activation": "silu",
    "target_modules": ["layers.0", "layers.1"],
}
LAYER = ModuleShape(3, 3, kind="layer")


def test_the_last_layer_of_meft1_has_no_second_bottleneck() -> None:
    config = read(MINIMAL)
    first, last = (set(config.shapes(f"layers.{n}", LAYER)) for n in (0, 1))
    assert {name.partition(".")[0] for name in first - last} == {"meft_coupling"}
    assert {name.partition(".")[0] for name in last} == {"meft_feed_forward"}
    other = read({**MINIMAL, "variant": "meft2"})
    assert other.shapes("layers.0", LAYER) == other.shapes("layers.1", LAYER)


def test_it_is_on_every_layer_or_on_none() -> None:
    config = read({**MINIMAL, "target_modules": ["layers.0"]})
    assert config.targets("layers.1", LAYER)
    assert not config.targets("layers.0", ModuleShape(3, 3))


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("variant", "meft4", "unsupported_feature"),
        ("lambda_bits", 8, "bad_config"),
        ("lambda_bits", True, "bad_config"),
        ("activation", "cube", "unsupported_feature"),
        ("target_modules", "all-linear", "bad_config"),
        ("a_key_of_the_future", 1, "unsupported_feature"),
    ],
)
def test_what_is_not_served_is_refused_by_name(key: str, value: Any, reason: str) -> None:
    with pytest.raises(AdapterFormatError, match=key) as caught:
        read({**MINIMAL, key: value})
    assert caught.value.reason == reason
