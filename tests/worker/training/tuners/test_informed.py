"""LoftQ and EVA: where A and B start, that files hold plain LoRA, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from models.errors import InvalidRequestError
from tests.worker.training.tiny import attach, lora, make_spec, make_trainer, tiny_llama
from worker.base_models import dequantise_, load_model
from worker.training import checkpoint, methods
from worker.training.loop import Trainer
from worker.training.tuners.informed import start_eva

IDS = torch.arange(3, 27)[None]
LAYER = "model.layers.0.mlp.up_proj"

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


class Silent:
    def untrained(self, loss: float, accuracy: float, total_steps: int) -> None: ...

    def step(self, metrics: Any, progress: Any, total_steps: int) -> None: ...


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(directory)
    return directory


def test_loftq_starts_at_the_best_approximation_of_what_4_bits_lost(base: Path) -> None:
    held: Any = load_model(base, precision="nf4")
    model: Any = attach(held, lora(r=8, alpha=16, init="loftq"))
    module = model.get_base_model().get_submodule(LAYER)
    a, b = (each["default"].weight.detach() for each in (module.lora_A, module.lora_B))
    plain: Any = load_model(base, precision="nf4")
    dequantise_(plain)
    whole: Any = tiny_llama().get_submodule(LAYER)
    lost = whole.weight - plain.get_submodule(LAYER).weight
    least = torch.linalg.svdvals(lost)[8:].norm()
    assert float((lost - 2 * b @ a).norm() / least) == pytest.approx(1, abs=1e-3)
    with torch.no_grad():
        exact = tiny_llama()(IDS).logits
        off = float((plain(IDS).logits - exact).norm())
        assert float((model.eval()(IDS).logits - exact).norm()) < 0.97 * off


def test_loftq_is_refused_where_nothing_is_lost_or_the_files_do_not_tell(base: Path) -> None:
    with pytest.raises(InvalidRequestError, match="what 4 bits lose") as caught:
        methods.require_fit(lora(init="loftq"), "bf16", None)
    assert (caught.value.param, caught.value.code) == ("peft.init", "unsupported_combination")
    methods.require_fit(lora(init="loftq"), "nf4", None)
    with pytest.raises(InvalidRequestError, match="before quantisation"):
        attach(tiny_llama(), lora(init="loftq"))


def eva_trainer() -> Trainer:
    return make_trainer(make_spec(peft=lora(r=4, init="eva")))


def test_eva_starts_at_the_main_directions_of_the_inputs(tmp_path: Path) -> None:
    trainer = eva_trainer()
    inputs = []
    plain: Any = tiny_llama()
    hook = plain.get_submodule(LAYER).register_forward_pre_hook(
        lambda _, args: inputs.append(args[0][0])
    )
    with torch.no_grad():
        for row in trainer.task.train:
            plain(torch.as_tensor(row.input_ids, dtype=torch.int64)[None])
    hook.remove()
    trainer.begin(Silent())
    a = trainer.parameters[f"base_model.model.{LAYER}.lora_A.weight"].detach()
    torch.testing.assert_close(a @ a.T, torch.eye(4), atol=1e-4, rtol=0)
    # Of what four directions can have of the inputs, looked at row by row, they have most.
    every = torch.cat(inputs)
    most = torch.linalg.svdvals(every)[:4].square().sum()
    assert float((every @ a.T).square().sum() / most) > 0.95
    before = trainer.evaluate(trainer.task.train).mean_loss
    trainer.run(Silent(), lambda *_: None, lambda: None)
    assert trainer.evaluate(trainer.task.train).mean_loss < before
    checkpoint.save(trainer, tmp_path / "saved", "tiny")
    stored = load_file(tmp_path / "saved" / "adapter" / "adapter_model.safetensors")
    assert stored[f"base_model.model.{LAYER}.lora_A.weight"].shape == (4, 64)


def test_what_has_learned_keeps_its_a() -> None:
    trainer = eva_trainer()
    trainer.begin(Silent())
    trainer.step()
    before = {name: each.detach().clone() for name, each in trainer.parameters.items()}
    trainer.begin(Silent())
    assert all(torch.equal(each, before[name]) for name, each in trainer.parameters.items())


def test_fewer_tokens_than_ranks_leave_the_other_rows_as_they_were_drawn() -> None:
    model: Any = attach(tiny_llama(), lora(r=4))
    first = model.get_base_model().get_submodule(LAYER).lora_A["default"].weight
    drawn = first.detach().clone()
    start_eva(model, "default", [[5, 6]])
    assert torch.equal(first[2:], drawn[2:])
    torch.testing.assert_close(first[:2] @ first[:2].T, torch.eye(2), atol=1e-5, rtol=0)
