"""What a form greys is what the service refuses when a job is submitted."""

import pytest

from api.ui.fitting import refusals
from models.domain.estimates import BaseShape, LayerShape
from models.errors import InvalidRequestError
from worker.training import methods, objectives

LAYERS = {"q_proj": LayerShape(outputs=4, inputs=4, count=2)}
LLAMA = BaseShape(layers=LAYERS, n_other=8)
BERT = BaseShape(layers=LAYERS, n_other=8, family="encoder", n_biases=4)
PRECISIONS = ("nf4", "int8", "bf16", "fp32")


def test_every_reason_is_that_of_a_refusal_and_no_refusal_is_left_out() -> None:
    found = refusals({"llama": LLAMA, "bert": BERT, "new": None}, PRECISIONS)
    assert set(found["bases"]) == {"llama", "bert"}
    for name, shape in (("llama", LLAMA), ("bert", BERT)):
        reasons = found["bases"][name]
        for method in methods.all_methods():
            for precision in PRECISIONS:
                reason = found["precisions"][method].get(precision)
                reason = reason or reasons["peft.type"].get(method)
                if reason is None:
                    methods.require_fit({"type": method}, precision, shape)
                    continue
                with pytest.raises(InvalidRequestError) as caught:
                    methods.require_fit({"type": method}, precision, shape)
                assert reason in caught.value.message
        for objective in objectives.all_objectives().values():
            reason = reasons["objective.type"].get(objective.name)
            if reason is None:
                objective.require_base(shape.family)
            else:
                with pytest.raises(InvalidRequestError, match=objective.name):
                    objective.require_base(shape.family)


def test_known_refusals() -> None:
    found = refusals({"llama": LLAMA}, PRECISIONS)
    assert "nf4" in found["precisions"]["full"]
    assert "fp32" not in found["precisions"]["lora"]
    assert "no biases" in found["bases"]["llama"]["peft.type"]["bitfit"]
