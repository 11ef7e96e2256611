"""Virtual tokens: where they start, what sees them, and that nothing else of a pass changes."""

from typing import Any

import pytest
import torch

from models.errors import InvalidRequestError
from tests.worker.training.tiny import attach, lora, make_spec, tiny_llama
from worker.training import recompute
from worker.training.forward import choose_forward
from worker.training.tuners.virtual import virtual_of

IDS = torch.arange(3, 15)[None]


def attached(kind: str, n_tokens: int = 4) -> Any:
    return attach(tiny_llama(), {"type": kind, "n_tokens": n_tokens}).eval()


def test_they_start_as_words_that_the_base_knows() -> None:
    model = attached("prompt")
    first = virtual_of(model, "default").embeddings
    assert first is not None
    known = model.get_base_model().get_input_embeddings().weight
    drawn = torch.cdist(first, known).argmin(1)
    assert torch.equal(first, known[drawn])
    # A prefix of the same words says what the words say.
    prefix = attached("prefix")
    with torch.no_grad():
        words = torch.cat([drawn[None], IDS], 1)
        expected = tiny_llama()(words).logits[:, 4:]
        assert torch.allclose(model(IDS).logits, expected, atol=1e-5)
        assert torch.allclose(prefix(IDS).logits, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_a_padded_row_is_the_row_alone_and_without_the_adapter_the_base_is_back(kind: str) -> None:
    model = attached(kind)
    padded = torch.cat([IDS, torch.zeros(1, 3, dtype=torch.int64)], 1)
    mask = (torch.arange(padded.shape[1]) < IDS.shape[1]).long()[None]
    with torch.no_grad():
        alone = model(IDS).logits
        found = model(input_ids=padded, attention_mask=mask).logits[:, : IDS.shape[1]]
        assert torch.allclose(found, alone, atol=1e-5)
        plain = tiny_llama()(IDS).logits
        assert not torch.allclose(alone, plain, atol=1e-2)
        with model.disable_adapter():
            assert torch.equal(model(IDS).logits, plain)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_rows_one_after_another_are_refused_so_that_training_pads(kind: str) -> None:
    model = attached(kind)
    with pytest.raises(ValueError, match="side by side"):
        model(input_ids=IDS, position_ids=torch.arange(IDS.shape[1])[None])
    precision = make_spec().precision
    forward, reason = choose_forward(model, precision, "cpu", 0, cache_weights=False)
    assert forward.pads
    assert reason is not None
    assert "side by side" in reason


def test_layers_that_run_again_would_lose_a_prefix() -> None:
    assert recompute.is_possible(attached("prompt"))
    assert not recompute.is_possible(attached("prefix"))


def test_other_adapters_have_no_place_beside_them() -> None:
    with pytest.raises(InvalidRequestError, match="virtual tokens"):
        attach(attach(tiny_llama(), lora()), {"type": "prompt"}, adapter="other")
