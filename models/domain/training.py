"""A training job as the service understands it: what the API accepts and the worker runs."""

from typing import Annotated, Literal

from pydantic import Field, StrictBool, StrictInt

from models.domain.base import Frozen, JsonObject, Parameters, Text
from models.domain.generation import AdapterRef

Auto = Literal["auto"]
PositiveRate = Annotated[float, Field(gt=0, le=1, strict=True)]


class Hyperparameters(Parameters):
    """OpenAI's three numbers; ``"auto"`` becomes a recorded number before training starts."""

    n_epochs: Auto | Annotated[StrictInt, Field(ge=1, le=50)] = "auto"
    batch_size: Auto | Annotated[StrictInt, Field(ge=1, le=256)] = "auto"
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=1000, strict=True)] = "auto"


class Precision(Parameters):
    """How the frozen base model is held in memory.

    ``nf4`` is bitsandbytes' 4-bit NormalFloat in blocks of 64 (QLoRA, arXiv 2305.14314, section 3);
    ``double_quant`` also quantises the block constants (4.127 instead of 4.5 bits a parameter).
    ``int8`` has one scale for each row of a weight (arXiv 2208.07339).
    """

    type: Literal["nf4", "int8", "bf16", "fp32"] = "nf4"
    double_quant: StrictBool = True


class Optimizer(Parameters):
    """An optimizer with linear warm-up and a schedule; `learning_rate` "auto" goes by model size.

    8-bit states take a quarter of AdamW's memory; paged ones leave a GPU when its memory is short.
    """

    type: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "adafactor"] = (
        "adamw"
    )
    learning_rate: Auto | PositiveRate = "auto"
    weight_decay: Annotated[float, Field(ge=0, le=1, strict=True)] = 0.0
    beta1: Annotated[float, Field(ge=0, lt=1, strict=True)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1, strict=True)] = 0.999
    max_grad_norm: Annotated[float, Field(gt=0, le=1000, strict=True)] = 1.0
    warmup_ratio: Annotated[float, Field(ge=0, le=1, strict=True)] = 0.06
    schedule: Literal["linear", "cosine", "constant"] = "linear"


class EarlyStopping(Parameters):
    """Stop after `patience` evaluations without an improvement of at least `min_delta`."""

    patience: Annotated[StrictInt, Field(ge=1, le=1000)] = 3
    min_delta: Annotated[float, Field(ge=0, le=100, strict=True)] = 0.0


class TrainingSpec(Frozen):
    """Everything that determines a run; stored as JSON in the job row and re-parsed by the worker.

    `objective` and `peft` hold the dumped ``Params`` of one file in ``worker/training/objectives``
    or ``worker/training/methods``; only those registries know their fields. `validation_split` is
    the share of the training rows that is held out when there is no validation file; which rows
    follows from their content and `seed`. `init_adapter` is the adapter or checkpoint whose weights
    training starts with. `packing` lays rows one after another where the model allows it; without
    it they are padded.
    """

    model: Text
    init_adapter: AdapterRef | None = None
    training_file: Text
    validation_file: Text | None = None
    validation_split: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    suffix: Text = ""
    seed: Annotated[StrictInt, Field(ge=0, le=2**31 - 1)]
    hyperparameters: Hyperparameters = Hyperparameters()
    objective: JsonObject
    peft: JsonObject
    precision: Precision = Precision()
    optimizer: Optimizer = Optimizer()
    max_seq_length: Annotated[StrictInt, Field(ge=16, le=131072)] = 2048
    on_error: Literal["fail", "skip"] = "fail"
    on_overlong: Literal["error", "drop", "truncate"] = "error"
    early_stopping: EarlyStopping | None = None
    checkpoint_steps: Auto | Annotated[StrictInt, Field(ge=1, le=1_000_000)] = "auto"
    priority: Annotated[StrictInt, Field(ge=-100, le=100)] = 0
    num_devices: Annotated[StrictInt, Field(ge=1, le=64)] = 1
    packing: StrictBool = True

    def resolved(self, n_rows: int, n_parameters: int, rate_scale: float = 1.0) -> "TrainingSpec":
        """Return a copy in which every ``"auto"`` is a number.

        Args:
            n_rows: Rows that will be trained in one epoch.
            n_parameters: Parameters of the base model.
            rate_scale: The objective's and the method's factor of the learning rate.

        The rules, also in ``docs/jobs.md``: batch 8 (less below 64 rows); as many epochs as give
        about 100 steps, between 3 and 10; the learning rate of `base_learning_rate`.
        """
        given = self.hyperparameters
        batch_size = min(8, max(1, n_rows // 8))
        if given.batch_size != "auto":
            batch_size = given.batch_size
        steps_per_epoch = -(-n_rows // batch_size)
        n_epochs = given.n_epochs
        if n_epochs == "auto":
            n_epochs = min(10, max(3, round(100 / steps_per_epoch)))
        multiplier = given.learning_rate_multiplier
        if multiplier == "auto":
            multiplier = 1.0
        learning_rate = self.optimizer.learning_rate
        if learning_rate == "auto":
            learning_rate = min(1.0, base_learning_rate(n_parameters) * rate_scale * multiplier)
        checkpoint_steps = self.checkpoint_steps
        if checkpoint_steps == "auto":
            checkpoint_steps = min(100, max(1, steps_per_epoch))
        return self.model_copy(
            update={
                "hyperparameters": Hyperparameters(
                    n_epochs=n_epochs,
                    batch_size=batch_size,
                    learning_rate_multiplier=multiplier,
                ),
                "optimizer": self.optimizer.model_copy(update={"learning_rate": learning_rate}),
                "checkpoint_steps": checkpoint_steps,
            }
        )

    @property
    def is_resolved(self) -> bool:
        numbers = self.hyperparameters
        return "auto" not in (
            numbers.n_epochs,
            numbers.batch_size,
            numbers.learning_rate_multiplier,
            self.optimizer.learning_rate,
            self.checkpoint_steps,
        )


def base_learning_rate(n_parameters: int) -> float:
    """Return the learning rate for adapters on a base of this size (specs: methods, LoRA defaults).

    1e-3 up to 200 M parameters, 2e-4 from 1 B, log-linear between.
    """
    small, large = 200e6, 1e9
    if n_parameters <= small:
        return 1e-3
    if n_parameters >= large:
        return 2e-4
    share: float = (n_parameters - small) / (large - small)
    return float(1e-3 * (2e-4 / 1e-3) ** share)
