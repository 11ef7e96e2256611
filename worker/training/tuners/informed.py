"""Starts of LoRA that know more than the weight: what its quantisation lost, or the job's rows.

LoftQ (arXiv 2310.08659, algorithm 1 with T = 1): on a 4-bit base, ``scale · B A`` starts at the
best approximation of rank r of what the quantisation lost; further steps would change the base,
which all adapters share. EVA (arXiv 2410.07170, section 3.2): A starts at the main directions of
the layer's inputs on the job's own rows, B at 0; all ranks stay r (ρ = 1). Both are plain LoRA
from then on.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from numpy.typing import ArrayLike
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import nn

from models.errors import InvalidRequestError
from worker.training.principal import factors, frozen_weight

EVA_TOKENS = 4096
"""Tokens whose inputs are looked at."""
_SPARE = 8
"""Directions kept between rows beyond those that are wanted."""


def start_loftq(model: PeftModel, adapter: str) -> None:
    """Set the matrices of every LoRA layer to what 4 bits lost of its weight.

    Uses torch's global random numbers.

    Raises:
        InvalidRequestError: the base's files do not have a layer's weight (``peft.init``).
    """
    base: Any = model.get_base_model()
    stored = StoredWeights(Path(str(base.config.name_or_path)))
    for path, module in _layers(model, adapter):
        held = frozen_weight(module.get_base_layer())
        rank, scale = module.r[adapter], module.scaling[adapter]
        if rank > min(held.shape):
            raise InvalidRequestError(
                f"peft.r: {rank} is more than the rank of {path} (shape {list(held.shape)}). "
                "Lower r, or leave init out.",
                param="peft.r",
            )
        lost = stored.like(path, held) - held
        first, second = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        a, b = factors(lost, rank, scale, "pissa")
        first.data, second.data = a.to(first).contiguous(), b.to(second).contiguous()


class StoredWeights:
    """The weights in a base model's files, one at a time.

    Args:
        directory: In Hugging Face layout.
    """

    def __init__(self, directory: Path) -> None:
        self._files: dict[str, Path] = {}
        for path in sorted(directory.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                self._files |= dict.fromkeys(file.keys(), path)

    def like(self, path: str, held: torch.Tensor) -> torch.Tensor:
        """Return the stored weight of the layer `path` as float32 in the shape of `held` [out, in].

        Names in files may lack the backbone's name, or have it where the model has not.

        Raises:
            InvalidRequestError: there is none, or several, or it has another shape.
        """
        wanted = f".{path}.weight"
        keys = [
            key for key in self._files if wanted.endswith(f".{key}") or f".{key}".endswith(wanted)
        ]
        if len(keys) == 1:
            with safe_open(self._files[keys[0]], framework="pt", device=str(held.device)) as file:
                weight: torch.Tensor = file.get_tensor(keys[0]).float()
            if weight.shape == held.shape:
                return weight
            if weight.T.shape == held.shape:  # of the GPT-2 kind
                return weight.T
        raise InvalidRequestError(
            f"peft.init: the files of this base model do not tell the weight of {path} before "
            "quantisation, which 'loftq' starts from. Choose another init.",
            param="peft.init",
        )


@torch.no_grad()
def start_eva(model: PeftModel, adapter: str, rows: Iterable[ArrayLike]) -> None:
    """Set every A whose B is 0 to the main directions of its layer's inputs.

    Args:
        model: Whose adapter is fresh; one that has learned stays as it is.
        adapter: Its name in PEFT.
        rows: Token ids; the first `EVA_TOKENS` tokens of them are looked at.
    """
    layers = [each for _, each in _layers(model, adapter)]
    if any(module.lora_B[adapter].weight.any() for module in layers):
        return
    found: dict[nn.Module, torch.Tensor] = {}

    def look(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        inputs = args[0].detach().float().flatten(0, -2)
        kept = found.get(module)
        wanted = min(module.r[adapter] + _SPARE, inputs.shape[-1])
        both = inputs if kept is None else torch.cat([kept, inputs])
        found[module] = _main_directions(both, int(wanted))

    hooks = [module.register_forward_pre_hook(look) for module in layers]
    was_training = model.training
    try:
        for ids in _first_tokens(rows, model.device):
            model.eval()(**_inputs(model, ids))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    for module in layers:
        if module in found:
            first = module.lora_A[adapter].weight
            assert isinstance(first, nn.Parameter)
            directions = nn.functional.normalize(found[module][: len(first)], dim=1)
            first.data[: len(directions)] = directions.to(first)


def _main_directions(rows: torch.Tensor, n: int) -> torch.Tensor:
    """Return at most `n` right singular vectors of rows [m, d], each times its singular value.

    Taken together with further rows they stand for these ones: an incremental decomposition.
    """
    values, left = torch.linalg.eigh(rows.double() @ rows.double().T)
    order = values.argsort(descending=True)[:n]
    order = order[values[order] > values.max() * 1e-10]
    return (left[:, order].T @ rows.double()).float()


def _first_tokens(rows: Iterable[ArrayLike], device: torch.device) -> Iterator[torch.Tensor]:
    left = EVA_TOKENS
    for row in rows:
        ids = torch.as_tensor(row, dtype=torch.int64, device=device)[:left]
        left -= len(ids)
        if not len(ids):
            return
        yield ids[None]


def _inputs(model: PeftModel, ids: torch.Tensor) -> dict[str, Any]:
    config: Any = model.get_base_model().config
    more = {"decoder_input_ids": ids} if config.is_encoder_decoder else {}
    return {"input_ids": ids, "use_cache": False, **more}


def _layers(model: PeftModel, adapter: str) -> list[tuple[str, Any]]:
    """Return the LoRA layers of an adapter by the base's own paths."""
    base: Any = model.get_base_model()
    return [
        (path, module)
        for path, module in base.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.lora_A
    ]
