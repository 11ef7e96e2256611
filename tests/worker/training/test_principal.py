"""Principal starts: what A and B are at first, which half learns, what is refused."""

from typing import Any

import pytest
import torch

from models.errors import InvalidRequestError
from tests.worker.training.tiny import attach, lora, make_spec, make_trainer, tiny_llama
from worker.training import methods
from worker.training.model import trainable_parameters

LAYER = "base_model.model.model.layers.0.mlp.up_proj"
WEIGHT = "model.layers.0.mlp.up_proj.weight"


def halves(init: str, **changes: Any) -> tuple[torch.Tensor, ...]:
    peft = lora(r=4, alpha=8, init=init, **changes)
    found = trainable_parameters(attach(tiny_llama(), peft))
    a = found[f"{LAYER}.lora_A.weight"].detach()
    b = found[f"{LAYER}.lora_B.weight"].detach()
    return *a.split(len(a) // 2), *b.split(b.shape[1] // 2, dim=1)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_pissa_starts_at_the_best_approximation_of_its_rank(use_rslora: bool) -> None:
    a, same_a, b, negative_b = halves("pissa", use_rslora=use_rslora)
    weight = tiny_llama().state_dict()[WEIGHT]
    # Vectors of nearly equal singular values are not determined; what they leave over is.
    least = torch.linalg.svdvals(weight)[4:].norm()
    scale = 8 / 4**0.5 if use_rslora else 8 / 4
    assert float((weight - scale * b @ a).norm() / least) == pytest.approx(1, abs=1e-4)
    assert torch.equal(a, same_a)
    assert torch.equal(b, -negative_b)


def test_olora_starts_at_orthonormal_columns() -> None:
    a, _, b, _ = halves("olora")
    torch.testing.assert_close(b.T @ b, torch.eye(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(b.T @ tiny_llama().state_dict()[WEIGHT], a, atol=1e-4, rtol=0)


def test_one_half_learns_and_the_other_stays_in_a_packed_pass_too() -> None:
    trainer = make_trainer(make_spec(peft=lora(init="pissa")))
    before = {name: each.detach().clone() for name, each in trainer.parameters.items()}
    trainer.step()
    for name, after in trainer.parameters.items():
        moved = (after != before[name]).any(dim=1 if "lora_A" in name else 0)
        assert moved.tolist() == [True] * 4 + [False] * 4


def test_a_pattern_sets_ranks_and_keeps_scales() -> None:
    peft = lora(
        r=4, alpha=8, init="pissa", rank_pattern={"up_proj": 2}, alpha_pattern={"up_proj": 6}
    )
    model = attach(tiny_llama(), peft)
    up: Any = model.get_submodule(LAYER)
    q: Any = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert (up.r["default"], up.scaling["default"]) == (4, 3)
    assert (q.r["default"], q.scaling["default"]) == (8, 2)


def test_a_rank_beyond_the_weight_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="Lower r") as caught:
        attach(tiny_llama(), lora(r=128, init="olora"))
    assert caught.value.param == "peft.r"


def test_a_pattern_for_what_is_no_target_is_refused() -> None:
    peft = lora(target_modules=["q_proj"], rank_pattern={"v_proj": 2})
    with pytest.raises(InvalidRequestError, match="There are: q_proj") as caught:
        attach(tiny_llama(), methods.parse_params(peft).model_dump())
    assert caught.value.param == "peft.rank_pattern"
