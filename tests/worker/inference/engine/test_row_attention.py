"""Attention by compiled loops: to marked rows only, and to nothing that says more than the mark."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tests.worker.inference.tiny import tiny_llama
from worker.inference.engine import row_attention
from worker.inference.engine.row_attention import NAME, Rows, mark, use_compiled_attention_

LENGTHS = [2, 5]


def make(implementation: str = "sdpa") -> LlamaForCausalLM:
    model = tiny_llama(hidden_size=32, num_hidden_layers=1)
    model.set_attn_implementation(implementation)
    return model


def states() -> tuple[Any, ...]:
    """A module, a query, keys, values, and a mask of rows of `LENGTHS`."""
    torch.manual_seed(0)
    query = torch.randn(2, 4, 1, 8)
    keys, values = torch.randn(2, 2, 2, 6, 8)
    mask = torch.zeros(2, 1, 1, 6)
    for row, length in enumerate(LENGTHS):
        mask[row, ..., length:] = torch.finfo(torch.float32).min
    return make().model.layers[0].self_attn, query, keys, values, mask


def test_marked_rows_are_attended_to_as_torch_does(monkeypatch: Any) -> None:
    use_compiled_attention_(make())
    module, query, keys, values, mask = states()
    expected, _ = sdpa_attention_forward(module, query, keys, values, mask, scaling=0.5)
    monkeypatch.setattr(row_attention, "sdpa_attention_forward", None)
    mark(keys, Rows(np.array(LENGTHS), mask))
    attention = AttentionInterface()[NAME]
    found, _ = attention(module, query, keys, values, mask, scaling=0.5, dropout=0.0)
    torch.testing.assert_close(found, expected)
    expected, _ = attention(module, query, keys, values, mask, scaling=8**-0.5)
    found, _ = attention(module, query, keys, values, mask)
    torch.testing.assert_close(found, expected)


def test_what_is_not_marked_or_says_more_is_left_to_torch() -> None:
    use_compiled_attention_(make())
    attention = AttentionInterface()[NAME]
    module, query, keys, values, mask = states()
    bias = torch.randn(2, 4, 1, 6)
    wrong = Rows(np.array([1, 1]), mask)  # told from the mask, were it looked at
    unmarked = keys.clone()
    mark(keys, wrong)
    for asked, given, added in (
        (unmarked, mask, None),
        (keys, mask + bias[:, :1], None),
        (keys, mask, bias),
    ):
        expected, _ = sdpa_attention_forward(
            module, query, unmarked, values, given, scaling=0.5, position_bias=added
        )
        found, _ = attention(module, query, asked, values, given, scaling=0.5, position_bias=added)
        torch.testing.assert_close(found, expected)


def test_only_a_model_that_attends_by_torchs_kernel_is_changed() -> None:
    model, eager = make(), make("eager")
    use_compiled_attention_(model)
    use_compiled_attention_(eager)
    assert model.config._attn_implementation == NAME
    assert eager.config._attn_implementation == "eager"


def test_a_prompt_is_the_same_with_either() -> None:
    model = make()
    ids = torch.arange(10)[None]
    with torch.inference_mode():
        expected = model(input_ids=ids).logits
        use_compiled_attention_(model)
        assert torch.equal(model(input_ids=ids).logits, expected)


SIZES = [(64, 64), (20, 64), (2, 399), (64, 400)]


@pytest.mark.parametrize(
    ("kind", "n_tokens", "width"),
    # Where something is stored transformers gives a mask.
    [("none", 64, 64), *((kind, *each) for kind in ("bool", "float", "rows") for each in SIZES)],
)
def test_prompts_are_attended_to_as_torch_does(kind: str, n_tokens: int, width: int) -> None:
    use_compiled_attention_(make())
    module = make().model.layers[0].self_attn
    torch.manual_seed(0)
    query = torch.randn(2, 4, n_tokens, 8)
    keys, values = torch.randn(2, 2, 2, width, 8)
    seen = torch.ones(n_tokens, width, dtype=torch.bool).tril(width - n_tokens)[None, None]
    if kind == "rows":
        seen = seen.repeat(2, 1, 1, 1)
        seen[1, :, :, :5] = False
        seen[1, :, :, width - n_tokens] = True
    lowest = torch.finfo(torch.float32).min
    mask = {
        "none": None,
        "float": torch.zeros(seen.shape).masked_fill(~seen, lowest),
    }.get(kind, seen)
    expected, _ = sdpa_attention_forward(module, query, keys, values, mask, scaling=0.4)
    found, _ = AttentionInterface()[NAME](module, query, keys, values, mask, scaling=0.4)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("n_tokens", [1, 64])
def test_what_torch_refuses_is_refused_and_not_left_out(n_tokens: int) -> None:
    """Scores that are capped (Gemma 2) would be others, and nobody would know."""
    use_compiled_attention_(make())
    module, query, keys, values, mask = states()
    if n_tokens > 1:
        query, mask = torch.randn(2, 4, n_tokens, 8), None
        keys, values = torch.randn(2, 2, 2, n_tokens, 8)
    else:
        mark(keys, Rows(np.array(LENGTHS), mask))
    with pytest.raises(ValueError, match="softcap"):
        AttentionInterface()[NAME](module, query, keys, values, mask, softcap=50.0)


@pytest.mark.parametrize("how", ["asked", "of the module"])
def test_tokens_that_may_look_ahead_do(how: str) -> None:
    use_compiled_attention_(make())
    module = make().model.layers[0].self_attn
    query, keys, values = (torch.randn(2, n, 64, 8) for n in (4, 2, 2))
    options: dict[str, Any] = {"is_causal": False} if how == "asked" else {}
    module.is_causal = how == "asked"
    expected, _ = sdpa_attention_forward(module, query, keys, values, None, **options)
    found, _ = AttentionInterface()[NAME](module, query, keys, values, None, **options)
    torch.testing.assert_close(found, expected)
