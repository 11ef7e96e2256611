"""The real SmolLM2 with 30 layers and the real MiniLM with 6: exact, near the base, and flat."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, BertModel

from bench._activations import saved_bytes
from bench._meft_worker import minilm_directory
from worker.base_models import BaseModelInfo, load_tokenizer
from worker.training.reversible.tuner import KINDS, MeftConfig, stack_of

TEXT = "The harbour opens at six. Boats from the north pier leave first, and the ferry is at nine."

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def mismatches(model: Any, **inputs: torch.Tensor) -> int:
    """Train one step; return how many integers of all layers did not come back."""
    stack = stack_of(model)
    stack.keeps_history = True
    model.train()(**inputs)[0].sum().backward()
    plan = stack.last_plan
    assert plan is not None
    assert plan.history == []  # all layers were compared
    return plan.n_mismatches


def minilm() -> BertModel:
    model = BertModel.from_pretrained(minilm_directory())
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("variant", KINDS)
def test_six_layers_of_minilm_come_back_bit_for_bit_with_dropout(variant: str) -> None:
    torch.manual_seed(0)
    ids = torch.randint(1000, 30_000, (2, 32))
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    model = get_peft_model(minilm(), MeftConfig(variant=variant, lambda_bits=3))
    assert mismatches(model, input_ids=ids, attention_mask=mask) == 0


def test_minilm_starts_near_its_base() -> None:
    ids = torch.tensor([load_tokenizer(minilm_directory())(TEXT)["input_ids"]])
    with torch.no_grad():
        base = minilm()(input_ids=ids).last_hidden_state
        model: Any = get_peft_model(minilm(), MeftConfig(lambda_bits=7))
        found = model.eval()(input_ids=ids).last_hidden_state
    assert float(torch.cosine_similarity(found, base, dim=-1).mean()) >= 0.999


def test_thirty_layers_of_smollm2_come_back_bit_for_bit_and_keep_the_spared_bits_alone(
    smollm2: tuple[Path, BaseModelInfo],
) -> None:
    directory, _ = smollm2
    base: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = torch.tensor([load_tokenizer(directory)(TEXT)["input_ids"]])
    with torch.no_grad():
        expected = float(base(input_ids=ids, labels=ids).loss)
    model: Any = get_peft_model(base, MeftConfig(lambda_bits=7, activation="silu"))
    assert mismatches(model, input_ids=ids, labels=ids, use_cache=False) == 0  # type: ignore[arg-type]
    with torch.no_grad():
        found = float(model.eval()(input_ids=ids, labels=ids).loss)
    assert abs(found - expected) < 0.05
    stack_of(model).keeps_history = False
    backbone = model.get_base_model().model

    def below_the_head() -> torch.Tensor:
        hidden: torch.Tensor = backbone(input_ids=ids, use_cache=False).last_hidden_state
        return hidden

    n = ids.numel() * base.config.hidden_size
    final_norm = 3 * 4 * n
    assert saved_bytes(below_the_head) <= 2 * 8 * n + 30 * n * 7 // 8 + final_norm
