"""LoRA (arXiv 2106.09685): ``y = W x + scale · B A dropout(x)``, only A and B are trained.

On an ``nf4`` base this is QLoRA (arXiv 2305.14314).
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import AfterValidator, Field, StrictBool, StrictInt, StrictStr

from models.domain.base import JsonObject
from models.domain.estimates import BaseShape, LayerShape
from models.errors import InvalidRequestError
from worker.training.methods import register
from worker.training.methods.base import DEFAULT_ADAPTER, Method, MethodParams, unsupported

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    from worker.training.task import Task

PRINCIPAL = ("pissa", "olora")
"""Starts that are taken from the base weights (``worker.training.principal``)."""
_MAGNITUDE = ("lora_magnitude_vector.weight", "lora_magnitude_vector")
"""DoRA's parameter in the model and in the file."""
_MODULE_NAME = r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$"


def _plain(name: str) -> str:
    if not re.fullmatch(_MODULE_NAME, name):
        raise ValueError(f"{name[:60]!r} is no module name: letters, digits, '_' and '.' only")
    return name


ModuleName = Annotated[
    StrictStr,
    Field(max_length=200, json_schema_extra={"pattern": _MODULE_NAME}),
    AfterValidator(_plain),
]
"""A plain module path or its end; PEFT would take other characters for a regular expression."""


def _distinct(names: list[str]) -> list[str]:
    if len(set(names)) != len(names):
        raise ValueError("must not name a module twice")
    return names


def _separate(pattern: dict[str, Any]) -> dict[str, Any]:
    # PEFT lets the first name that fits decide, and files do not keep the order of their keys.
    for name in pattern:
        for other in pattern:
            if name.endswith(f".{other}"):
                raise ValueError(f"{name!r} is also meant by {other!r}; name each layer once")
    return pattern


Targets: TypeAlias = (
    Literal["all-linear"]
    | Annotated[list[ModuleName], Field(min_length=1, max_length=256), AfterValidator(_distinct)]
)
"""Which linear layers a method adapts."""


class LoraParams(MethodParams):
    """Low-rank matrices beside the linear layers."""

    type: Literal["lora"] = "lora"
    r: Annotated[StrictInt, Field(ge=1, le=256)] = Field(
        16, description="Rank: columns of B and rows of A. More learns more and costs more memory."
    )
    alpha: Annotated[float, Field(gt=0, le=10_000, strict=True)] = Field(
        32.0, description="Strength: the change is scaled by alpha / r (alpha / √r with rsLoRA)."
    )
    dropout: Annotated[float, Field(ge=0, lt=1, strict=True)] = Field(
        0.05, description="Share of the inputs of A that are dropped in training."
    )
    target_modules: Targets = Field(
        "all-linear",
        description="Linear layers that get matrices: all but the head, or names such as `q_proj`.",
    )
    use_dora: StrictBool = Field(
        False,
        description=(
            "DoRA (arXiv 2402.09353): the size of each output's weight is learned apart from its "
            "direction. Slower by a quarter."
        ),
    )
    use_rslora: StrictBool = Field(
        False, description="Rank-stabilised scaling alpha / √r (arXiv 2312.03732)."
    )
    lora_plus_ratio: Annotated[float, Field(ge=1, le=100, strict=True)] = Field(
        1.0,
        description="LoRA+ (arXiv 2402.12354): B learns so many times as fast as A; 16 is usual.",
    )
    init: Literal["default", "gaussian", "pissa", "olora", "loftq", "eva"] = Field(
        "default",
        description=(
            "`default`, `gaussian`: A is drawn Kaiming-uniform or Gaussian, B starts at 0. `pissa` "
            "(arXiv 2404.02948), `olora` (arXiv 2406.01775): both start at the weight's principal "
            "singular vectors or its QR factors; the adapter has rank 2r. `loftq` (arXiv "
            "2310.08659), on `nf4` bases: both start at what 4 bits lost of the weight. `eva` "
            "(arXiv 2410.07170): A starts at the main directions of the layer's inputs on the "
            "job's rows."
        ),
    )
    rank_pattern: Annotated[
        dict[ModuleName, Annotated[StrictInt, Field(ge=1, le=256)]],
        Field(max_length=256),
        AfterValidator(_separate),
    ] = Field({}, description="Other ranks for some of the targets: their names, and each's rank.")
    alpha_pattern: Annotated[
        dict[ModuleName, Annotated[float, Field(gt=0, le=10_000, strict=True)]],
        Field(max_length=256),
        AfterValidator(_separate),
    ] = Field({}, description="Other strengths for some of the targets, in the same form.")

    @property
    def widening(self) -> int:
        """How many times r the stored rank is: a principal start keeps its own negative."""
        return 2 if self.init in PRINCIPAL else 1

    @property
    def stored(self) -> JsonObject:
        """Rank and strength as PEFT names them; the scale stays that of the ranks asked for."""
        wider = self.widening
        # alpha / r stays when both double; alpha / √r when alpha grows by √2.
        stronger = math.sqrt(wider) if self.use_rslora else wider
        return {
            "r": wider * self.r,
            "lora_alpha": stronger * self.alpha,
            "rank_pattern": {name: wider * rank for name, rank in self.rank_pattern.items()},
            "alpha_pattern": {name: stronger * each for name, each in self.alpha_pattern.items()},
        }


@register
class Lora(Method):
    """Through peft, with float32 weights whatever the base is held in."""

    name: ClassVar[str] = "lora"
    title: ClassVar[str] = "LoRA, QLoRA"
    when: ClassVar[str] = (
        "The first choice: learns as much as full fine-tuning from small data, on any base."
    )
    Params: ClassVar[type[MethodParams]] = LoraParams
    precisions: ClassVar[frozenset[str]] = frozenset({"nf4", "int8", "bf16", "fp32"})
    may_change: ClassVar[frozenset[str]] = frozenset({"dropout", "lora_plus_ratio"})

    def mixes(self, params: Any) -> bool:
        # DoRA needs whole weights, and a principal start changes the base that others share.
        return not params.use_dora and params.init not in PRINCIPAL

    def attach(
        self,
        model: "PreTrainedModel | PeftModel",
        params: Any,
        seed: int,
        adapter: str = DEFAULT_ADAPTER,
    ) -> "PeftModel":
        """Add A ~ U(−1/√d_in, 1/√d_in) (or another start) and B to the targeted linear layers."""
        from peft import LoraConfig
        from peft.tuners.lora import LoraLayer

        from worker.training.dropout import BitDropout
        from worker.training.principal import start_principal
        from worker.training.tuners.attach import attach_adapter, is_transposed
        from worker.training.tuners.informed import start_loftq

        config = LoraConfig(
            task_type="CAUSAL_LM",
            lora_dropout=params.dropout,
            target_modules=target_names(model, params),
            use_rslora=params.use_rslora,
            use_dora=params.use_dora,
            init_lora_weights="gaussian" if params.init == "gaussian" else True,
            fan_in_fan_out=is_transposed(model),
            **params.stored,
        )

        def start(adapted: "PeftModel") -> None:
            if params.init in PRINCIPAL:
                start_principal(adapted, params.init, adapter)
            elif params.init == "loftq":
                start_loftq(adapted, adapter)

        adapted = attach_adapter(model, config, seed, adapter, start)
        for module in adapted.modules():
            if not isinstance(module, LoraLayer) or adapter not in module.lora_A:
                continue
            # DoRA's pass asks whether the module is PEFT's own dropout.
            if params.dropout and not params.use_dora:
                module.lora_dropout[adapter] = BitDropout(params.dropout)
        return adapted

    def redraw(self, model: "PeftModel", params: Any, seed: int) -> bool:
        if params.use_dora or params.init not in ("default", "gaussian"):
            return False
        from worker.training.tuners.attach import redraw_lora

        redraw_lora(model, "gaussian" if params.init == "gaussian" else True, seed)
        return True

    def require_fit(self, params: Any, precision: str, shape: BaseShape | None) -> None:
        super().require_fit(params, precision, shape)
        if params.init == "loftq" and precision != "nf4":
            raise unsupported(
                "peft.init: 'loftq' makes up for what 4 bits lose, and the base is held in "
                f"{precision!r}. Choose precision 'nf4', or another init.",
                "peft.init",
            )

    def first_pass(self, task: "Task", run: Callable[[], object]) -> str | None:
        """Take the first A from the job's rows where that is asked for."""
        params: Any = task.method_params
        if params.init == "eva":
            from worker.training.tuners.informed import start_eva

            start_eva(task.model, task.adapter, (each.input_ids for each in task.train))
        return super().first_pass(task, run)

    def adapter_config(
        self, model: "PeftModel", params: Any, base_model: str, adapter: str = DEFAULT_ADAPTER
    ) -> JsonObject:
        """Return PEFT's configuration with the targets as a list, as every server takes it."""
        from peft import LoraConfig

        config = model.peft_config[adapter]
        assert isinstance(config, LoraConfig)
        return {
            "base_model_name_or_path": base_model,
            "bias": "none",
            "fan_in_fan_out": config.fan_in_fan_out,
            "inference_mode": True,
            "init_lora_weights": "gaussian" if params.init == "gaussian" else True,
            "lora_dropout": params.dropout,
            "peft_type": "LORA",
            "target_modules": sorted(config.target_modules or ()),
            "task_type": "CAUSAL_LM",
            "use_dora": params.use_dora,
            "use_rslora": params.use_rslora,
            **params.stored,
        }

    def published(
        self, trained: "Mapping[str, torch.Tensor]", params: Any
    ) -> "dict[str, torch.Tensor]":
        """Return the tensors by PEFT's names; DoRA's magnitudes are called as they were once."""
        return {name.replace(*_MAGNITUDE): tensor for name, tensor in trained.items()}

    def taken_up(
        self, published: "Mapping[str, torch.Tensor]", params: Any
    ) -> "dict[str, torch.Tensor]":
        own, stored = _MAGNITUDE
        return {
            name.removesuffix(stored) + own if name.endswith(stored) else name: tensor
            for name, tensor in published.items()
        }

    def count_parameters(self, shape: BaseShape, params: Any) -> int:
        """Return Σ rank · (inputs + outputs) over the targeted layers; DoRA adds the outputs."""
        names = params.target_modules
        if names == "all-linear":
            names = list(shape.layers)
        n_parameters = 0
        for name in names:
            last = name.rpartition(".")[2]
            if (layer := shape.layers.get(last)) is not None:
                n_layers = layer.count if name == last else 1
                n_ranks = _sum_of_ranks(params, name, n_layers)
                n_parameters += int(params.widening) * n_ranks * (layer.inputs + layer.outputs)
                n_parameters += layer.outputs * n_layers if params.use_dora else 0
        return int(n_parameters)

    def rate_factor(self, parameter: str, params: Any) -> float:
        return params.lora_plus_ratio if ".lora_B." in parameter else 1.0

    def learns_first(self, parameter: str) -> bool:
        return ".lora_B." in parameter  # with B = 0, A's first gradient is exactly 0


def target_names(model: "PreTrainedModel | PeftModel", params: Any) -> list[str]:
    """Return names that PEFT's suffix match turns into exactly the layers that are meant.

    Raises:
        InvalidRequestError: a name matches no linear layer, or there is none to adapt.
    """
    from worker.training.tuners.attach import linear_layers

    linears = list(linear_layers(model))
    last_parts = sorted({path.rpartition(".")[2] for path in linears})
    if not linears:
        raise InvalidRequestError(
            f"This base model has no linear layer that {params.type} could adapt.", param="model"
        )
    given = params.target_modules
    names = last_parts if given == "all-linear" else list(given)
    _require_known("target_modules", names, linears)
    targets = [path for path in linears if any(_ends_with(path, name) for name in names)]
    _require_known("rank_pattern", getattr(params, "rank_pattern", ()), targets)
    _require_known("alpha_pattern", getattr(params, "alpha_pattern", ()), targets)
    return names


def counted_layers(shape: BaseShape, targets: Any) -> list[LayerShape]:
    """Return the layers that `targets` mean, as far as the last parts of names tell.

    A target that names more than the last part is counted as one layer.
    """
    names = list(shape.layers) if targets == "all-linear" else targets
    found = []
    for name in names:
        last = name.rpartition(".")[2]
        if (layer := shape.layers.get(last)) is not None:
            count = layer.count if name == last else 1
            found.append(layer.model_copy(update={"count": count}))
    return found


def _sum_of_ranks(params: LoraParams, name: str, n_layers: int) -> int:
    """Return the ranks of the `n_layers` layers called `name`, added up."""
    pattern = params.rank_pattern
    for key, rank in pattern.items():
        if _ends_with(name, key):
            return rank * n_layers
    special = [rank for key, rank in pattern.items() if _ends_with(key, name)]
    return sum(special) + params.r * (n_layers - len(special))


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _require_known(field: str, names: Iterable[str], paths: Sequence[str]) -> None:
    """Raise `InvalidRequestError` for a name in ``peft.{field}`` that none of `paths` ends with."""
    for name in names:
        if not any(_ends_with(path, name) for path in paths):
            there = ", ".join(sorted({path.rpartition(".")[2] for path in paths}))
            what = "linear layer" if field == "target_modules" else "target"
            raise InvalidRequestError(
                f"peft.{field}: no {what} is called {name!r}. There are: {there}.",
                param=f"peft.{field}",
            )
