"""PEFT's own tuners as methods: what they refuse, on what bases they train, what they store."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from models.domain.training import Precision
from models.errors import InvalidRequestError
from tests.worker.training.tiny import attach, tiny_llama
from worker.base_models import load_model
from worker.training import methods
from worker.training.methods.base import Served
from worker.training.methods.peft_tuners import Tuner
from worker.training.model import autocast, trainable_parameters

IDS = torch.arange(3, 15)[None]
SMALL: dict[str, dict[str, Any]] = {
    "adalora": {"r": 2, "initial_r": 4},
    "loha": {"r": 4},
    "lokr": {"r": 4},
    "miss": {"r": 8},
    "oft": {"block_size": 8},
    "randlora": {"r": 8},
    "vera": {"r": 8},
}
TUNERS: dict[str, Tuner] = {
    name: each for name, each in methods.all_methods().items() if isinstance(each, Tuner)
}
ON_4_BITS = sorted(name for name, each in TUNERS.items() if "nf4" in each.precisions)
UPRIGHT_ONLY = sorted(name for name, each in TUNERS.items() if not each.takes_transposed)


def test_all_are_here_and_merged() -> None:
    assert set(TUNERS) == set(SMALL)
    assert {each.served(each.Params()) for each in TUNERS.values()} == {Served.MERGED}


@pytest.mark.parametrize("name", ON_4_BITS)
def test_they_train_on_4_bits_and_leave_those_as_they_are(name: str, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    base: Any = load_model(tmp_path, precision="nf4")
    model: Any = attach(base, {"type": name, **SMALL[name]})
    held = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    with autocast(Precision(type="nf4"), "cpu"):  # as a pass of training is
        model(input_ids=IDS, labels=IDS).loss.backward()
    parameters = trainable_parameters(model)
    assert {each.dtype for each in parameters.values()} == {torch.float32}
    first = [n for n in parameters if TUNERS[name].learns_first(n)]
    assert first
    gradients = [parameters[n].grad for n in first]
    assert all(each is not None and bool(each.any()) for each in gradients)
    kept = dict(model.named_parameters())
    assert all(torch.equal(kept[n], p) for n, p in held.items())


@pytest.mark.parametrize("name", UPRIGHT_ONLY)
def test_transposed_layers_are_refused_with_what_takes_them(name: str) -> None:
    base: Any = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=4))
    with pytest.raises(InvalidRequestError, match="Choose 'lora', 'vera'") as caught:
        attach(base, {"type": name, **SMALL[name]})
    assert (caught.value.param, caught.value.code) == ("peft.type", "unsupported_combination")


@pytest.mark.parametrize("name", ["loha", "lokr"])
def test_dense_weights_only(name: str) -> None:
    with pytest.raises(InvalidRequestError, match="nf4") as caught:
        methods.require_fit({"type": name}, "nf4", None)
    assert caught.value.param == "precision.type"


def test_more_rows_than_inputs_are_refused_in_pefts_words() -> None:
    with pytest.raises(InvalidRequestError, match=r"`r` \(65\) must be less"):
        attach(tiny_llama(), {"type": "miss", "r": 65})


def test_only_the_named_layers_are_adapted() -> None:
    model = attach(tiny_llama(), {"type": "vera", "r": 8, "target_modules": ["q_proj"]})
    layers = {name.rpartition(".vera_")[0] for name in trainable_parameters(model)}
    paths = {f"base_model.model.model.layers.{at}.self_attn.q_proj" for at in (0, 1)}
    assert layers == paths
