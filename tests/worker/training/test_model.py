"""QLoRA on the real SmolLM2 in NF4: what is held, what moves, and that evaluation ruins nothing."""

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from torch import nn

from models.domain.rows import ChatRow
from models.domain.training import Precision
from tests.worker.training.service import chat_rows
from tests.worker.training.tiny import attach, digest_of_base, lora, make_spec, tiny_llama
from worker.base_models import BaseModelInfo, compute_dtype, load_tokenizer, nf4_bits_per_parameter
from worker.chat import ChatRenderer
from worker.inference.engine.params import ModuleShape
from worker.training import methods, objectives
from worker.training.batches import RowPolicy, build_dataset
from worker.training.forward import PaddedForward, choose_forward
from worker.training.loop import Trainer
from worker.training.model import (
    build_model,
    guard_quantised_weights,
    module_shapes,
    set_threads,
    set_training,
    trainable_parameters,
)
from worker.training.objectives.base import Example, LanguageForward
from worker.training.task import Task

N_LINEARS = 30 * 7


def build(directory: Path, precision: Precision) -> PeftModel:
    return build_model(
        directory,
        precision,
        methods.get_method("lora"),
        methods.parse_params(lora()),
        seed=7,
        device="cpu",
    )


@pytest.fixture(scope="module")
def nf4(smollm2: tuple[Path, BaseModelInfo]) -> PeftModel:
    return build(smollm2[0], Precision())


@pytest.fixture(scope="module")
def examples(smollm2: tuple[Path, BaseModelInfo]) -> list[Example]:
    return render(smollm2[0], 4)


def render(directory: Path, n_rows: int) -> list[Example]:
    renderer = ChatRenderer(load_tokenizer(directory))
    rows = ((line, ChatRow.model_validate(row)) for line, row in enumerate(chat_rows(n_rows), 1))
    policy = RowPolicy("fail", "error", 200)
    made: list[Example] = []
    build_dataset(rows, renderer, policy, "training_file", made)
    return made


def make_nf4_trainer(model: PeftModel, examples: list[Example], **changes: Any) -> Trainer:
    spec = make_spec(precision=Precision().model_dump(), **changes)
    forward, reason = choose_forward(model, spec.precision, "cpu", 0, cache_weights=False)
    assert reason is None
    task = Task(
        model=model,
        forward=forward,
        method=methods.get_method("lora"),
        method_params=methods.parse_params(spec.peft),
        objective=objectives.get_objective("sft"),
        objective_params=objectives.parse_params({}),
        spec=spec,
        train=examples,
        valid=(),
        device="cpu",
    )
    return Trainer(task)


def test_every_targeted_layer_stays_four_bits_with_nested_constants(nf4: PeftModel) -> None:
    layers = [module for module in nf4.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(layers) == N_LINEARS
    for layer in layers:
        weight: Any = layer.weight
        state = weight.quant_state
        assert weight.dtype == torch.uint8
        assert state.quant_type == "nf4"
        assert state.blocksize == 64
        assert state.nested
        assert state.state2 is not None
        assert state.state2.blocksize == 256
    assert len(trainable_parameters(nf4)) == 2 * N_LINEARS


def test_the_base_takes_the_papers_bits_per_parameter(nf4: PeftModel) -> None:
    assert nf4_bits_per_parameter(nf4) == pytest.approx(4.127, abs=0.001)


def test_only_the_head_stays_outside(nf4: PeftModel) -> None:
    shapes = module_shapes(nf4)
    assert len([each for each in shapes.values() if each.kind == "linear"]) == N_LINEARS + 1
    assert shapes["lm_head"] == ModuleShape(576, 49152, is_output=True)
    assert shapes["model.layers.0.self_attn.k_proj"] == ModuleShape(576, 192)
    assert shapes["model.layers.0.input_layernorm"] == ModuleShape(576, 576, kind="norm")


def test_training_and_evaluating_leave_gradients_what_they_were(
    nf4: PeftModel, examples: list[Example]
) -> None:
    trainer = make_nf4_trainer(nf4, examples)

    def gradients() -> tuple[float, torch.Tensor]:
        nf4.train()
        scores = trainer._sums(examples, backward=True)
        flat = [p.grad.flatten() for p in trainer.parameters.values() if p.grad is not None]
        trainer.optimizer.zero_grad()
        return scores.loss, torch.cat(flat)

    loss, before = gradients()
    trainer.evaluate(examples)
    again, after = gradients()
    assert again == loss
    assert before.norm() > 0
    cosine = torch.nn.functional.cosine_similarity(before, after, dim=0)
    assert cosine > 0.9999
    assert nf4_bits_per_parameter(nf4) == pytest.approx(4.127, abs=0.001)


def test_an_unguarded_layer_is_refused(nf4: PeftModel) -> None:
    layer = next(module for module in nf4.modules() if isinstance(module, bnb.nn.Linear4bit))
    layer.support_avx512bf16_for_cpu = True
    try:
        with pytest.raises(RuntimeError, match="would be repacked"):
            guard_quantised_weights(nf4)
    finally:
        layer.support_avx512bf16_for_cpu = False


def test_qlora_learns_and_moves_nothing_but_the_adapter(
    nf4: PeftModel, examples: list[Example]
) -> None:
    base = digest_of_base(nf4)
    trainer = make_nf4_trainer(
        nf4,
        examples,
        hyperparameters={"n_epochs": 6, "batch_size": 4, "learning_rate_multiplier": 1.0},
    )
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    losses: list[float] = []

    class Reporter:
        def untrained(self, *_: Any) -> None:
            return

        def step(self, metrics: Any, progress: Any, total_steps: int) -> None:
            losses.append(metrics.train_loss)

    trainer.run(Reporter(), lambda *_: None, lambda: None)
    assert losses[-1] < 0.7 * losses[0]
    assert digest_of_base(nf4) == base
    assert not any(torch.equal(before[name], p) for name, p in trainer.parameters.items())


def test_plain_precisions_keep_the_base_in_their_type(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    for kind, dtype in (("bf16", compute_dtype("cpu")), ("fp32", torch.float32)):
        model = build(tmp_path, Precision(type=kind))
        frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
        assert frozen == {dtype}
        assert {p.dtype for p in trainable_parameters(model).values()} == {torch.float32}
        assert model.training


def test_names_of_trained_weights_are_those_of_peft_files() -> None:
    names = trainable_parameters(attach(tiny_llama(), lora()))
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names


def test_packed_gradients_in_bfloat16_are_as_exact_as_pefts(
    smollm2: tuple[Path, BaseModelInfo],
) -> None:
    """Against float32; the B are random, so that no gradient is 0 (specs: training, section 5).

    Over several draws of them, since with one the ratio of both errors is 0.9 to 1.3.
    """

    batch = objectives.get_objective("sft").collate(render(smollm2[0], 6), "cpu")

    def gradients(precision: str, *, packed: bool) -> dict[tuple[int, str], torch.Tensor]:
        spec = Precision.model_validate({"type": precision})
        model = build(smollm2[0], spec)
        forward: LanguageForward = PaddedForward(model, spec, "cpu", 0)
        if packed:
            forward, reason = choose_forward(model, spec, "cpu", 0, cache_weights=False)
            assert reason is None
        found = {}
        for seed in (5, 6, 7):
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for name, parameter in trainable_parameters(model).items():
                    if ".lora_B." in name:
                        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
            forward.cross_entropy(batch).loss.backward()
            for name, parameter in trainable_parameters(model).items():
                assert parameter.grad is not None
                found[seed, name] = parameter.grad
            model.zero_grad(set_to_none=True)
        return found

    exact = gradients("fp32", packed=False)
    size = sum(gradient.square().sum() for gradient in exact.values())

    def error(found: dict[tuple[int, str], torch.Tensor]) -> float:
        gaps = ((found[name] - gradient).square().sum() for name, gradient in exact.items())
        return float((sum(gaps) / size) ** 0.5)

    ours, pefts = (error(gradients("bf16", packed=packed)) for packed in (True, False))
    in_bfloat16 = compute_dtype("cpu") == torch.bfloat16  # else both are as exact as float32
    assert 0 < ours <= (1.25 * pefts if in_bfloat16 else 1e-4)
    assert error(gradients("fp32", packed=True)) < 1e-4


def test_every_module_changes_its_mode_with_the_model() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(0.5)))
    for mode in (False, False, True, True):
        set_training(model, mode)
        assert {module.training for module in model.modules()} == {mode}


@pytest.mark.parametrize(("allowed", "expected"), [(4, 2), (1, 1)])
def test_threads_are_the_share_of_a_job_and_never_more_than_allowed(
    allowed: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(4))
    torch.set_num_threads(allowed)
    set_threads(jobs_at_a_time=2)
    try:
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(threads)
