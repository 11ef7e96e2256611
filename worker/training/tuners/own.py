"""A tuner in PEFT's form for what PEFT has not: bottleneck adapters, and parameters of their own.

Files are those of PEFT, with the ``peft_type`` of `BottleneckConfig` or `ReplacementConfig`, and
PEFT reads and merges them once this module is imported.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from worker.training.tuners.experts import Experts

BOTTLENECK, REPLACEMENT = "BOTTLENECK", "REPLACEMENT"
ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU}


@dataclass
class BottleneckConfig(PeftConfig):
    """Bottlenecks after the layers `target_modules`, and norms with parameters of their own.

    `n_experts` is 1 in every file: experts are for training only.
    """

    r: int = 64
    activation: str = "gelu"
    std: float = 0.01
    n_experts: int = 1
    shares_up: bool = True
    target_modules: list[str] | str | None = None
    norm_modules: list[str] = field(default_factory=list)
    modules_to_save: list[str] | None = None
    exclude_modules: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = BOTTLENECK


@dataclass
class ReplacementConfig(PeftConfig):
    """Layers `target_modules` compute with other `parameters` than the base's, or with all other.

    Parameters that several layers of the base share are shared here too.
    """

    parameters: list[str] | None = None
    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    exclude_modules: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = REPLACEMENT


class OwnLayer(nn.Module, BaseTunerLayer):
    """What `OwnTuner` puts around a layer of the base, whose attributes it shows."""

    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module, adapter: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._disable_adapters = False
        self.merged_adapters = []
        self._active_adapter = adapter

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def active_of(self, there: Any) -> list[str]:
        """Return the adapters in the dictionary `there` that the next pass goes through."""
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if name in there]


class BottleneckLayer(OwnLayer):
    """``z + U f(D z + b) + c`` of what the base's layer gives, z [..., d] (arXiv 1902.00751, 2.1).

    It wraps the layer, so it is before the residual sum and works whatever the layer is held in.
    """

    adapter_layer_names = ("own_down", "own_up")

    def __init__(self, base_layer: nn.Module, adapter: str) -> None:
        super().__init__(base_layer, adapter)
        self.own_down = nn.ModuleDict()
        self.own_up = nn.ModuleDict()
        self.own_activation = nn.ModuleDict()

    def add(self, adapter: str, config: BottleneckConfig) -> None:
        """Add near-identity weights: normal, cut at 2 σ; biases 0."""
        layer: Any = self.get_base_layer()
        width = layer.nf if isinstance(layer, Conv1D) else layer.out_features
        n_up = 1 if config.shares_up else config.n_experts
        self.own_down[adapter] = _linear(width, config.r, config.n_experts, config.std)
        self.own_up[adapter] = _linear(config.r, width, n_up, config.std)
        self.own_activation[adapter] = ACTIVATIONS[config.activation]()
        device = next(layer.parameters()).device
        self.own_down[adapter].to(device)
        self.own_up[adapter].to(device)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        base: Any = self.base_layer
        z: torch.Tensor = base(*args, **kwargs)
        for name in self.active_of(self.own_down):
            # Without autocast the small products run in the adapter's float32.
            is_cast = torch.is_autocast_enabled(z.device.type)
            x = z if is_cast else z.float()
            hidden = self.own_activation[name](self.own_down[name](x))
            z = z + self.own_up[name](hidden).to(z.dtype)
        return z

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise ``ValueError``: no weight of the base does what a non-linear adapter does."""
        raise ValueError("A bottleneck adapter cannot be merged into the base.")


class ReplacedLayer(OwnLayer):
    """The base's layer, computed with float32 parameters of the adapter's, cast to the base's."""

    adapter_layer_names = ("own_parameters",)
    other_param_names = ("tied",)

    def __init__(self, base_layer: nn.Module, adapter: str) -> None:
        super().__init__(base_layer, adapter)
        self.own_parameters = nn.ModuleDict()
        self.tied: dict[str, dict[str, nn.Parameter]] = {}
        """Parameters of other layers, which this one shares in the base as well."""

    def add(self, adapter: str, names: list[str], shared: dict[int, nn.Parameter]) -> None:
        """Add copies of the layer's parameters `names`; those in `shared` are taken from there."""
        mine, tied = nn.ParameterDict(), {}
        for name in names:
            base = self.base_layer.get_parameter(name)
            if id(base) in shared:
                tied[name] = shared[id(base)]
            else:
                shared[id(base)] = nn.Parameter(base.detach().to(torch.float32, copy=True))
                mine[name] = shared[id(base)]
        self.own_parameters[adapter] = mine
        self.tied[adapter] = tied

    def _cast(self, adapter: str) -> dict[str, torch.Tensor]:
        mine = self.own_parameters[adapter]
        assert isinstance(mine, nn.ParameterDict)
        own = dict(mine.items()) | self.tied[adapter]
        return {n: p.to(self.base_layer.get_parameter(n).dtype) for n, p in own.items()}

    @property
    def weight(self) -> torch.Tensor:
        """The weight of the next pass: some models read it instead of calling the layer."""
        for name in self.active_of(self.own_parameters):
            own = self._cast(name)
            if "weight" in own:
                return own["weight"]
        return self.get_base_layer().get_parameter("weight")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for name in self.active_of(self.own_parameters):
            return functional_call(self.base_layer, self._cast(name), args, kwargs)
        base: Any = self.base_layer
        return base(*args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter in self.own_parameters:
                for name, value in self._cast(adapter).items():
                    self.base_layer.get_parameter(name).data = value.detach().clone()
                self.merged_adapters.append(adapter)


class OwnTuner(BaseTuner):
    """Puts the layers of both configurations on a model."""

    prefix = "own_"
    tuner_layer_cls = OwnLayer

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # type: ignore[override]
        if key in getattr(peft_config, "norm_modules", ()):
            return True
        return BaseTuner._check_target_module_exists(peft_config, key)

    def _check_tied_modules(self, model: nn.Module, peft_config: Any) -> None:
        """Nothing to warn of: what the base shares is shared here."""

    def _check_merge_allowed(self) -> None:
        """Nor in a merge."""

    def inject_adapter(self, *args: Any, **kwargs: Any) -> None:
        self._shared: dict[int, nn.Parameter] = {}
        super().inject_adapter(*args, **kwargs)
        del self._shared

    def _create_and_replace(  # noqa: PLR0913 (PEFT's signature)
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        is_bottleneck = isinstance(peft_config, BottleneckConfig)
        bottleneck = is_bottleneck and current_key not in peft_config.norm_modules
        layer: Any = target
        if not isinstance(layer, OwnLayer):
            layer = (BottleneckLayer if bottleneck else ReplacedLayer)(target, adapter_name)
            self._replace_module(parent, target_name, layer, target)
        if bottleneck:
            layer.add(adapter_name, peft_config)
        else:
            wanted = None if is_bottleneck else peft_config.parameters
            names = [name for name, _ in layer.base_layer.named_parameters(recurse=False)]
            layer.add(
                adapter_name, [n for n in names if wanted is None or n in wanted], self._shared
            )
        layer.set_adapter(self.active_adapters)


def replaceable(model: PreTrainedModel | PeftModel, parameters: list[str] | None) -> list[str]:
    """Return the base's paths of the layers that have `parameters` (any, if None) of their own."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    found = []
    for path, module in base.named_modules():
        layer = module.base_layer if isinstance(module, OwnLayer) else module
        inside = ".own_" in path or path.endswith(".base_layer")
        names = [name for name, _ in layer.named_parameters(recurse=False)]
        wanted = names if parameters is None else [n for n in names if n in parameters]
        if wanted and not inside and not list(layer.children()):
            found.append(path)
    return found


def _linear(inputs: int, outputs: int, n_experts: int, std: float) -> nn.Module:
    """Return one linear map, or one drawn from several."""
    layers = [nn.Linear(inputs, outputs, dtype=torch.float32) for _ in range(n_experts)]
    for layer in layers:
        nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
        nn.init.zeros_(layer.bias)
    return layers[0] if n_experts == 1 else Experts(layers)


for _config in (BottleneckConfig, ReplacementConfig):
    _type: Any = _config().peft_type
    PEFT_TYPE_TO_CONFIG_MAPPING[_type] = _config
    PEFT_TYPE_TO_TUNER_MAPPING[_type] = OwnTuner
    PEFT_TYPE_TO_PREFIX_MAPPING[_type] = OwnTuner.prefix
