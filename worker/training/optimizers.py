"""The optimizers: AdamW, the same with 8-bit or paged states, and Adafactor.

`AdamW <https://arxiv.org/abs/1711.05101>`_ (algorithm 2) keeps 8 bytes for each trained parameter;
with `8-bit states <https://arxiv.org/abs/2110.02861>`_ 2 bytes and block constants; Adafactor
(arXiv 1804.04235, algorithm 4, without its own learning rates) about none for matrices. Paged
states live in memory that a GPU shares with the host (arXiv 2305.14314, section 3), so that a spike
of activations does not end the run; on a CPU they are ordinary.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from models.domain.training import Optimizer

StateTensors = dict[str, torch.Tensor]
"""What is kept for one parameter, by the optimizer's own names; numbers are 0-dimensional."""

_SMALL_8BIT = {"step", "state1", "state2"}
_STATES: dict[str, tuple[set[str], ...]] = {
    "adamw": ({"step", "exp_avg", "exp_avg_sq"},),
    "adamw_8bit": (
        {*_SMALL_8BIT, "qmap1", "qmap2", "absmax1", "absmax2"},
        _SMALL_8BIT,  # tensors below 4096 numbers stay in float32
    ),
    "paged_adamw_32bit": (_SMALL_8BIT,),
    "adafactor": (
        {"step", "RMS", "exp_avg_sq_row", "exp_avg_sq_col"},
        {"step", "RMS", "exp_avg_sq"},
    ),
}
_STATES["paged_adamw_8bit"] = _STATES["adamw_8bit"]
_OF_THE_SHAPE = {"exp_avg", "exp_avg_sq", "state1", "state2"}
"""States that have their parameter's shape."""


def build(spec: Optimizer, groups: list[dict[str, Any]], rate: float) -> torch.optim.Optimizer:
    """Return the optimizer that `spec` names, over `groups` as torch takes them.

    Args:
        spec: Its type and numbers.
        groups: Of float32 parameters; other entries are kept.
        rate: The learning rate until somebody sets that of a group.
    """
    betas, decay = (spec.beta1, spec.beta2), spec.weight_decay
    match spec.type:
        case "adamw":
            return torch.optim.AdamW(groups, rate, betas, weight_decay=decay, fused=True)
        case "adafactor":
            from transformers.optimization import Adafactor

            return Adafactor(
                groups, rate, weight_decay=decay, scale_parameter=False, relative_step=False
            )
    from bitsandbytes import optim

    on_cpu = all(each.device.type == "cpu" for group in groups for each in group["params"])
    kinds = {
        "adamw_8bit": optim.AdamW8bit,
        "paged_adamw_8bit": optim.AdamW8bit if on_cpu else optim.PagedAdamW8bit,
        "paged_adamw_32bit": optim.AdamW32bit if on_cpu else optim.PagedAdamW32bit,
    }
    built: torch.optim.Optimizer = kinds[spec.type](groups, rate, betas, weight_decay=decay)
    return built


def state_tensors(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> StateTensors:
    """Return copies, on the CPU, of what is kept for a parameter."""
    return {
        name: torch.as_tensor(value).detach().to("cpu", copy=True).contiguous()
        for name, value in optimizer.state[parameter].items()
    }


def require_states(
    kind: str, shapes: Mapping[str, torch.Size], states: Mapping[str, StateTensors]
) -> None:
    """Raise `ValueError` unless `states` are those of an optimizer for parameters of `shapes`.

    Args:
        kind: The optimizer's type.
        shapes: By the names of the parameters.
        states: By the same names.
    """
    if shapes.keys() != states.keys():
        raise ValueError("it belongs to other parameters than this run trains")
    for name, shape in shapes.items():
        if set(states[name]) not in _STATES[kind]:
            raise ValueError(f"{name} has not the state of {kind}")
        for each, tensor in states[name].items():
            if each in _OF_THE_SHAPE and tensor.shape != shape:
                raise ValueError(f"{each} of {name} has shape {tuple(tensor.shape)}")


def load_states(optimizer: torch.optim.Optimizer, states: list[StateTensors]) -> None:
    """Put a fresh optimizer into the states of its parameters, in their order."""
    whole = optimizer.state_dict()
    is_torch = isinstance(optimizer, torch.optim.AdamW)
    whole["state"] = {
        index: {name: _of_kind(name, value, is_torch) for name, value in state.items()}
        for index, state in enumerate(states)
    }
    optimizer.load_state_dict(whole)
    for parameter in _paged(optimizer):
        own = optimizer.state[parameter]
        for name in ("state1", "state2"):
            page = optimizer.get_state_buffer(parameter, dtype=own[name].dtype)  # type: ignore[attr-defined]
            own[name] = page.copy_(own[name])


def _of_kind(name: str, value: torch.Tensor, is_torch: bool) -> Any:
    """Return a state as the optimizer keeps it: torch's step is a tensor, the others' a number."""
    return int(value) if name == "step" and not is_torch else value


def _paged(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    if not getattr(optimizer, "is_paged", False):
        return
    for group in optimizer.param_groups:
        yield from (each for each in group["params"] if each.device.type == "cuda")
