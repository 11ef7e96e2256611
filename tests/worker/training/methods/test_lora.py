"""LoRA on real modules: identity at the start, seeds, targets, and PEFT's reading of our files."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from models.errors import InvalidRequestError
from tests.worker.training.tiny import attach, lora, make_spec, make_trainer, tiny_llama
from worker.base_shape import read_shape
from worker.inference.engine.adapter_config import read_config
from worker.inference.engine.methods.lora import LoraConfig
from worker.training import checkpoint, methods
from worker.training.dropout import BitDropout
from worker.training.model import trainable_parameters

IDS = torch.tensor([[1, 2, 3, 4, 5, 6]])
PROJECTIONS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def test_nothing_changes_before_the_first_step() -> None:
    expected = tiny_llama()(IDS).logits
    model = attach(tiny_llama(), lora()).eval()
    assert torch.equal(model(IDS).logits, expected)


def test_all_linear_means_every_layer_but_the_head() -> None:
    parameters = trainable_parameters(attach(tiny_llama(), lora()))
    paths = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in parameters}
    assert sorted(paths) == PROJECTIONS
    assert len(parameters) == 2 * 2 * len(PROJECTIONS)


def test_the_number_of_trained_weights_follows_from_the_shapes() -> None:
    parameters = trainable_parameters(attach(tiny_llama(), lora(r=3)))
    one_layer = (64 + 64) * 2 + (64 + 32) * 2 + (64 + 128) * 3  # q, o; k, v; gate, up, down
    assert sum(parameter.numel() for parameter in parameters.values()) == 3 * 2 * one_layer


@pytest.mark.parametrize(
    "targets", ["all-linear", ["q_proj", "down_proj"], ["layers.1.mlp.up_proj"]]
)
def test_the_count_before_attaching_is_the_number_attached(tmp_path: Path, targets: object) -> None:
    given = lora(r=3, target_modules=targets)
    params = methods.parse_params(given)
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    expected = methods.get_method("lora").count_parameters(read_shape(tmp_path), params)
    parameters = trainable_parameters(attach(model, given))
    assert expected == sum(parameter.numel() for parameter in parameters.values())


def test_adapter_weights_are_float32_on_a_bfloat16_base() -> None:
    model = attach(tiny_llama(dtype=torch.bfloat16), lora())
    assert {p.dtype for p in trainable_parameters(model).values()} == {torch.float32}


def test_a_seed_fixes_the_start_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = trainable_parameters(attach(tiny_llama(), lora(), seed=5))
    assert torch.equal(torch.get_rng_state(), before)
    again = trainable_parameters(attach(tiny_llama(), lora(), seed=5))
    other = trainable_parameters(attach(tiny_llama(), lora(), seed=6))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if "lora_A" in name)


def test_a_starts_kaiming_uniform_and_b_at_zero() -> None:
    for name, parameter in trainable_parameters(attach(tiny_llama(), lora(r=64))).items():
        if "lora_B" in name:
            assert not parameter.any()
        else:
            bound = 1 / math.sqrt(parameter.shape[1])
            assert 0.9 * bound < parameter.abs().max() <= bound


def test_a_name_that_fits_nothing_is_answered_with_those_there_are() -> None:
    with pytest.raises(InvalidRequestError, match=r"'query'.*q_proj, up_proj, v_proj") as caught:
        attach(tiny_llama(), lora(target_modules=["q_proj", "query"]))
    assert caught.value.param == "peft.target_modules"


def test_the_head_and_the_embedding_are_no_targets() -> None:
    for name in ("lm_head", "embed_tokens", "proj"):
        with pytest.raises(InvalidRequestError, match="no linear layer"):
            attach(tiny_llama(), lora(target_modules=[name]))


def test_dropout_acts_on_the_adapter_in_training_only() -> None:
    model = attach(tiny_llama(), lora(dropout=0.5))
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.normal_(0, 0.1)
    model.train()
    assert not torch.equal(model(IDS).logits, model(IDS).logits)
    model.eval()
    assert torch.equal(model(IDS).logits, model(IDS).logits)
    drops = [m for m in model.modules() if isinstance(m, BitDropout)]
    assert [m.p for m in drops] == [0.5] * 2 * len(PROJECTIONS)


def test_named_targets_are_the_only_ones() -> None:
    names = trainable_parameters(
        attach(tiny_llama(), lora(target_modules=["layers.1.self_attn.q_proj", "v_proj"]))
    )
    paths = {name.rpartition(".lora_")[0].removeprefix("base_model.model.") for name in names}
    assert paths == {
        "model.layers.1.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.v_proj",
    }


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"init": "gaussian"}])
def test_peft_loads_what_is_saved_and_computes_the_same(
    changes: dict[str, object], tmp_path: Path
) -> None:
    trainer = make_trainer(make_spec(peft=lora(**changes)))
    with torch.no_grad():
        for parameter in trainer.parameters.values():
            parameter.normal_(0, 0.1)
    checkpoint.save(trainer, tmp_path / "state", "tiny")
    expected = trainer.task.model.eval()(input_ids=IDS).logits
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "state" / "adapter"))
    assert torch.equal(loaded.eval()(input_ids=IDS).logits, expected)


def test_the_configuration_names_the_base_and_is_one_that_is_served(tmp_path: Path) -> None:
    params = methods.parse_params(lora(r=4, alpha=8))
    config = methods.get_method("lora").adapter_config(attach(tiny_llama(), lora()), params, "tiny")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    served = read_config(tmp_path / "adapter_config.json")
    assert isinstance(served, LoraConfig)
    assert config["base_model_name_or_path"] == "tiny"
    assert config["target_modules"] == PROJECTIONS
    assert (served.r, served.alpha, served.scale("x")) == (4, 8, 2)


def test_an_adapter_beside_another_starts_as_it_does_alone() -> None:
    peft = lora(r=2, target_modules=["q_proj", "down_proj"])
    expected = trainable_parameters(attach(tiny_llama(), peft, seed=3))
    model = attach(attach(tiny_llama(), lora(r=8), seed=7), peft, 3, "beside")
    found = trainable_parameters(model, "beside")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    first = trainable_parameters(model)
    alone = trainable_parameters(attach(tiny_llama(), lora(r=8), seed=7))
    assert first.keys() == alone.keys()
    assert all(torch.equal(first[name], alone[name]) for name in alone)
