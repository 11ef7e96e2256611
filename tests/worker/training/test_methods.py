"""What every method promises, on a small random model of every family it claims.

A method that is registered is in here by itself; `CLAIMS` only says what else it is tried with.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from transformers import AutoConfig, PreTrainedModel

from tests.worker.training.encoders import ENCODERS, OBJECTIVES, SEQ2SEQ, config_of, rows_for
from tests.worker.training.tiny import (
    SIZES,
    attach,
    digest_of_base,
    make_examples,
    make_spec,
    make_task,
    make_trainer,
)
from worker.base_shape import read_shape
from worker.inference.engine.adapters import read_adapter
from worker.inference.engine.lora import BaseLayers
from worker.inference.engine.slots import Slots
from worker.training import checkpoint, methods, objectives
from worker.training.headed import headed_forward
from worker.training.loop import Trainer
from worker.training.methods.base import Served
from worker.training.model import module_shapes, trainable_parameters
from worker.training.objectives.base import IGNORED
from worker.training.tuners.attach import without_known_warnings

DECODERS = ("gemma", "gpt2", "gpt_neox", "llama", "mistral", "phi", "qwen2", "qwen3")
FAMILIES = {"decoder": DECODERS, "encoder": ENCODERS, "encoder_decoder": SEQ2SEQ}
TWO_FAMILIES = ("gpt2", "llama")
"""One with transposed, fused and tied weights and biases, one without."""
WITH_BIASES = ("gpt2", "gpt_neox", "phi", "qwen2", *ENCODERS, "bart")
FEW_STEPS = 0.02
"""The learning rate, that of LoRA, at which six steps are enough to see a loss fall."""
ANYWHERE = float("inf")


@dataclass(frozen=True)
class Claim:
    """One way to use a method: its parameters, and the families that it is tried on."""

    given: dict[str, Any]
    families: tuple[str, ...] = ()
    """None named: all that the method claims."""
    rate: float = FEW_STEPS
    start: float = 1e-5
    """Largest relative distance of its first logits from the base's."""
    formula: bool = True
    """Whether the count from a base's headers is exact for all families."""


def families_of(method: str) -> list[str]:
    """The families that a method claims; a tuner may not take the transposed weights of one."""
    claimed = methods.get_method(method)
    takes_transposed = getattr(claimed, "takes_transposed", True)
    families = [each for kind in sorted(claimed.families) for each in FAMILIES[kind]]
    return [each for each in families if takes_transposed or each != "gpt2"]


CLAIMS: dict[str, list[Claim]] = {
    "lora": [
        Claim({"r": 4, "dropout": 0.0}, formula=False),
        Claim({"r": 4, "dropout": 0.0, "init": "pissa"}, TWO_FAMILIES, formula=False),
        Claim(
            {"r": 4, "dropout": 0.0, "init": "olora", "use_rslora": True},
            TWO_FAMILIES,
            formula=False,
        ),
        Claim({"r": 4, "dropout": 0.0, "init": "eva"}, ("gpt2", "t5"), formula=False),
        Claim({"r": 4, "dropout": 0.0, "use_dora": True}, ("llama", "bert"), formula=False),
    ],
    "loha": [Claim({"r": 4}, formula=False)],
    "lokr": [Claim({"r": 4}, rate=0.05, formula=False)],
    "miss": [Claim({"r": 8}, formula=False)],
    "oft": [Claim({"block_size": 8}, formula=False)],
    "randlora": [Claim({"r": 8}, rate=0.003, formula=False)],
    "adalora": [Claim({"r": 4, "initial_r": 6}, rate=0.05, formula=False)],
    "prompt": [Claim({"n_tokens": 4}, rate=0.1, start=ANYWHERE)],
    "prefix": [Claim({"n_tokens": 4}, rate=0.1, start=ANYWHERE)],
    "vera": [Claim({"r": 16}, rate=0.1, formula=False)],
    "ia3": [
        Claim({}, (*DECODERS, *SEQ2SEQ), rate=0.2, formula=False),
        Claim({}, ENCODERS, rate=0.03, formula=False),
    ],
    "bitfit": [Claim({}, WITH_BIASES, rate=0.05)],
    "full": [Claim({})],
    "houlsby": [
        Claim({"r": 4}, rate=0.05, start=2e-2),
        Claim({"r": 4, "placement": "pfeiffer"}, TWO_FAMILIES, rate=0.1, start=2e-2),
    ],
    "adamix": [
        Claim({"r": 8, "experts": 2}, rate=0.1, start=2e-2),
        Claim(
            {"r": 8, "experts": 2, "shares_up": False},
            TWO_FAMILIES,
            rate=0.1,
            start=2e-2,
        ),
        Claim({"r": 4, "experts": 2, "over": "lora"}, TWO_FAMILIES, formula=False),
    ],
    "meft": [
        Claim({"r": 8}, rate=0.05, start=2e-2),
        Claim({"r": 8, "variant": "meft2"}, TWO_FAMILIES, rate=0.05, start=2e-2),
        Claim({"r": 8, "variant": "meft3"}, TWO_FAMILIES, rate=0.05, start=2e-2),
    ],
}
"""What each method is tried with; one that is not named has its defaults, on every family."""
CASES = [
    pytest.param((name, claim, family), id=f"{name}-{number}-{family}")
    for name in methods.all_methods()
    for number, claim in enumerate(CLAIMS.get(name, [Claim({})]))
    for family in claim.families or families_of(name)
]
IDS = torch.arange(3, 15)[None]

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    # So PEFT's own pass calls the cache of a prefix.
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
]


def tiny_model(family: str) -> Any:
    """A model of its own with the same weights on every call."""
    return copy.deepcopy(_drawn(family))


@cache
def _drawn(family: str) -> PreTrainedModel:
    kind = {"mlm": "MaskedLM", "seq2seq": "Seq2SeqLM"}.get(objective_of(family), "CausalLM")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if family in DECODERS:
            others = {"num_key_value_heads"} if family in ("gpt2", "gpt_neox") else set()
            sizes = {name: size for name, size in SIZES.items() if name not in others}
            config = AutoConfig.for_model(family, **sizes, initializer_range=0.2)
        else:
            config = config_of(family)
        auto = getattr(transformers, f"AutoModelFor{kind}")
        model = auto.from_config(config, dtype=torch.float32)
    prepared: PreTrainedModel = model.eval().requires_grad_(False)
    return prepared


def objective_of(family: str) -> str:
    return "mlm" if family in ENCODERS else "seq2seq" if family in SEQ2SEQ else "sft"


def trainer_of(peft: dict[str, Any], family: str, rate: float = FEW_STEPS) -> Trainer:
    name, model = objective_of(family), tiny_model(family)
    # A step sees a third of the ids, and what is judged are others.
    n_epochs, rate = (24, rate / 3) if name == "mlm" else (6, rate)
    given = OBJECTIVES.get(name, {}) | ({"mask_probability": 0.5} if name == "mlm" else {})
    spec = make_spec(
        objective=objectives.parse_params({"type": name, **given}).model_dump(),
        peft=methods.parse_params(peft).model_dump(),
        optimizer={"learning_rate": rate},
        hyperparameters={
            "n_epochs": n_epochs,
            "batch_size": 4,
            "learning_rate_multiplier": 1.0,
        },
    )
    if family in DECODERS:
        return make_trainer(spec, model=model, train=make_examples(4), padded=True)
    adapted = attach(model, spec.peft, spec.seed)
    forward = headed_forward(adapted, spec.precision, "cpu", 0)
    # One row under four masks is soon known by heart.
    rows = rows_for(name, 1) * 4 if name == "mlm" else rows_for(name, 4)
    return Trainer(make_task(adapted, forward, spec, train=rows))


def train(trainer: Trainer) -> list[float]:
    """Train to the end; return the loss on the rows before and after."""
    before = trainer.evaluate(trainer.task.train).mean_loss
    trainer.run(Silent(), lambda *_: None, lambda: None)
    return [before, trainer.evaluate(trainer.task.train).mean_loss]


class Silent:
    def untrained(self, loss: float, accuracy: float, total_steps: int) -> None: ...

    def step(self, metrics: Any, progress: Any, total_steps: int) -> None: ...


def logits(model: Any) -> torch.Tensor:
    """Those of `IDS`; PEFT's own pass gives them for virtual tokens too, which come first."""
    model.eval()
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False, **more).logits
    return found[:, -IDS.shape[1] :]


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert float((found - expected).norm() / expected.norm()) <= tolerance


@dataclass
class Run:
    """One case after its training."""

    claim: Claim
    family: str
    trainer: Trainer
    losses: list[float]
    base: str
    """The digest of the base before training."""
    start: torch.Tensor
    """The logits before training."""

    @property
    def served(self) -> Served:
        task = self.trainer.task
        return task.method.served(task.method_params)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are slower on two."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module", params=CASES)
def run(request: pytest.FixtureRequest) -> Run:
    name, claim, family = request.param
    trainer = trainer_of({"type": name, **claim.given}, family, rate=claim.rate)
    model = trainer.task.model
    base, start = digest_of_base(model), logits(model)
    return Run(claim, family, trainer, train(trainer), base, start)


def test_training_starts_at_the_base_and_the_loss_falls(run: Run) -> None:
    assert_close(run.start, logits(tiny_model(run.family)), run.claim.start)
    before, after = run.losses
    # Masks are drawn anew in every step, and those that are judged by are others.
    assert after < (1 if run.family in ENCODERS else 0.95) * before


def test_the_base_stays_bit_for_bit(run: Run) -> None:
    assert digest_of_base(run.trainer.task.model) == run.base


def test_what_is_not_trained_on_has_no_gradient(run: Run) -> None:
    trainer = run.trainer
    task = trainer.task
    task.model.train()
    batch = task.objective.collate(task.train, "cpu")
    batch.targets.fill_(IGNORED)
    sums = task.objective.loss(task.forward, batch, task.objective_params)
    sums.loss.backward()
    gradients = [parameter.grad for parameter in trainer.parameters.values()]
    trainer.optimizer.zero_grad(set_to_none=True)
    assert float(sums.loss.detach()) == 0
    assert not any(each.any() for each in gradients if each is not None)


def test_the_number_of_parameters_is_the_one_foretold(run: Run, tmp_path: Path) -> None:
    model: Any = tiny_model(run.family)
    model.save_pretrained(tmp_path)
    task, given = run.trainer.task, dict(run.claim.given)
    if task.method.name == "full" and run.family == "bart":
        pytest.skip("its file has a buffer too, which headers do not tell from a parameter")
    if not run.claim.formula and hasattr(task.method_params, "target_modules"):
        given["target_modules"] = [unique_layer(run.family)]
    elif not run.claim.formula and run.family != "llama":
        pytest.skip("several layers share a name, and headers do not tell the order of layers")
    params = methods.parse_params({"type": task.method.name, **given})
    foretold = task.method.count_parameters(read_shape(tmp_path), params)
    attached = trainable_parameters(attach(model, params.model_dump()))
    assert foretold == sum(parameter.numel() for parameter in attached.values())


def unique_layer(family: str) -> str:
    """A name that is one layer of each block: the estimate knows layers by their last names."""
    names = {
        "gpt2": "c_attn",
        "gpt_neox": "dense_h_to_4h",
        "phi": "fc1",
        "bart": "fc1",
        "bert": "query",
        "deberta-v2": "query_proj",
        "distilbert": "q_lin",
        "modernbert": "Wi",
        "roberta": "query",
        "t5": "wi",
    }
    return names.get(family, "up_proj")


def test_what_is_saved_gives_the_same_logits_everywhere(run: Run, tmp_path: Path) -> None:
    """PEFT reads it, the inference server takes it, and merged into the base it is the same."""
    trainer = run.trainer
    expected = logits(trainer.task.model)
    checkpoint.save(trainer, tmp_path, "tiny")
    with without_known_warnings():
        loaded = PeftModel.from_pretrained(tiny_model(run.family), str(tmp_path / "adapter"))
    assert_close(logits(loaded), expected)
    if run.served is Served.BATCHED and run.family in DECODERS:
        model = tiny_model(run.family)
        layers = BaseLayers(model)
        expected_shapes = module_shapes(trainer.task.model)
        stored = read_adapter(tmp_path / "adapter", "0" * 40, expected_shapes)
        assert {path: layers.shapes[path] for path in stored.modules} == {
            path: expected_shapes[path] for path in stored.modules
        }
        slots = Slots(layers.shapes, 1, torch.empty(0))
        layers.attach(slots)
        slots.use([slots.prepare(stored.weights(layers.read))])
        assert_close(logits(model), expected)
    if trainer.task.method.merges(trainer.task.method_params):
        merged: Any = copy.deepcopy(loaded).merge_and_unload()
        assert_close(logits(merged), expected, 1e-4)  # rounded in another order


def test_a_checkpoint_brings_back_what_was_trained(run: Run, tmp_path: Path) -> None:
    trainer = run.trainer
    checkpoint.save(trainer, tmp_path, "tiny")
    peft = trainer.task.spec.peft
    again = trainer_of(peft, run.family, rate=run.claim.rate)
    checkpoint.restore(again, tmp_path)
    assert again.progress == trainer.progress
    for name, parameter in trainer.parameters.items():
        assert torch.equal(again.parameters[name], parameter)
