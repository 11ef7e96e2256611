"""The state of a run after a step, as files: everything that an exact resume needs, and no pickle.

A directory written by `save` holds ``adapter/`` (PEFT's two files, servable as they are) and
``state/`` with `STATE_FILES`. On a CPU a run that is restored from it goes on bit for bit like one
that was never interrupted.
"""

import json
import random
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from models.domain.base import Frozen, JsonObject
from models.errors import TrainingFailedError
from worker.heads import PEFT_TASKS, head_paths, head_settings
from worker.training import optimizers
from worker.training.loop import Trainer
from worker.training.task import Progress

ADAPTER_CONFIG, ADAPTER_TENSORS = "adapter_config.json", "adapter_model.safetensors"
OPTIMIZER, RNG, TRAINER = "optimizer.safetensors", "rng.safetensors", "trainer.json"
STATE_FILES = (OPTIMIZER, RNG, TRAINER)
VALUE = "value"
"""What the file of the states holds beside them where the adapter's file is no way back."""

KEPT = "kept"
"""The same of what a method keeps."""

SMALL_FILES_BYTES = 1024**2


class StateError(ValueError):
    """Files that are no state of this run."""


class _TrainerState(Frozen):
    """``trainer.json``. `epoch` and `batch` are the cursor; they follow from the step."""

    step: int
    epoch: int
    batch: int
    n_tokens: int
    best_valid_loss: float | None
    n_without_improvement: int
    stopped_early: bool
    python_rng: tuple[int, list[int], float | None]
    numpy_rng: tuple[str, list[int], int, int, float]


def library_versions() -> dict[str, str]:
    """Return the versions of what a run's numbers depend on."""
    return {
        name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes", "numpy")
    }


def save(trainer: Trainer, directory: Path, base_model: str) -> None:
    """Write the state of `trainer` to an empty or missing `directory`.

    Args:
        trainer: Between two steps.
        directory: Where the files go.
        base_model: The base's name, which the adapter's configuration carries (never a path).

    Raises:
        TrainingFailedError: the disk has less than twice the room that is needed
            (``storage_full``).
    """
    directory.mkdir(parents=True, exist_ok=True)
    require_room(trainer, directory)
    task = trainer.task
    adapter, state = directory / "adapter", directory / "state"
    adapter.mkdir()
    state.mkdir()
    config = task.method.adapter_config(task.model, task.method_params, base_model, task.adapter)
    config |= head_config(trainer, config)
    (adapter / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))
    save_file(published_tensors(trainer), adapter / ADAPTER_TENSORS, metadata={"format": "pt"})
    tensors = _optimizer_tensors(trainer)
    if task.method.taken_up({}, task.method_params) is None:
        for name, parameter in trainer.parameters.items():
            tensors[f"{name}:{VALUE}"] = parameter.detach().to("cpu", copy=True).contiguous()
    tensors |= {f"{name}:{KEPT}": each for name, each in task.method.kept(task).items()}
    save_file(tensors, state / OPTIMIZER)
    save_file(_rng_tensors(), state / RNG)
    (state / TRAINER).write_text(_trainer_state(trainer).model_dump_json())


def restore(trainer: Trainer, directory: Path) -> None:
    """Put a fresh `trainer` (same specification, same data) into the state in `directory`.

    Raises:
        StateError: the files do not fit this trainer, which is left as it was.
    """
    state = directory / "state"
    try:
        moments = load_file(state / OPTIMIZER)
        weights = _taken_up(trainer, directory / "adapter")
        if weights is None:
            weights = {name: moments.pop(f"{name}:{VALUE}") for name in trainer.parameters}
        names = [name for name in moments if name.endswith(f":{KEPT}")]
        kept_by_method = {name.removesuffix(f":{KEPT}"): moments.pop(name) for name in names}
        rng = load_file(state / RNG)
        kept = _TrainerState.model_validate_json((state / TRAINER).read_bytes())
    except (OSError, SafetensorError, ValidationError, KeyError) as error:
        raise StateError(f"{type(error).__name__}: {error}") from error
    if kept.step > trainer.total_steps:
        raise StateError(f"step {kept.step} is beyond the last of this run")
    states = _by_parameter(moments)
    _require_fit(trainer, weights, states)
    with torch.no_grad():
        for name, parameter in trainer.parameters.items():
            parameter.copy_(weights[name])
    optimizers.load_states(trainer.optimizer, [states[name] for name in trainer.parameters])
    trainer.task.method.put_back(trainer.task, kept_by_method)
    trainer.progress = Progress(
        step=kept.step,
        n_tokens=kept.n_tokens,
        best_valid_loss=kept.best_valid_loss,
        n_without_improvement=kept.n_without_improvement,
        stopped_early=kept.stopped_early,
    )
    python_version, words, gauss = kept.python_rng
    random.setstate((python_version, tuple(words), gauss))
    name, key, position, has_gauss, cached = kept.numpy_rng
    np.random.set_state((name, np.array(key, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(rng["cpu"])
    for index in range(torch.cuda.device_count()):
        if f"cuda.{index}" in rng:
            torch.cuda.set_rng_state(rng[f"cuda.{index}"], index)


def start_from(trainer: Trainer, adapter: Path) -> None:
    """Give a fresh `trainer` the weights of the adapter in a directory, and no other state.

    Raises:
        StateError: it has other parameters than this run trains; the trainer is left as it was.
    """
    try:
        weights = _taken_up(trainer, adapter)
    except (OSError, SafetensorError) as error:
        raise StateError(f"{type(error).__name__}: {error}") from error
    if weights is None:
        raise StateError("what it was made from is not in its file")
    own = {name: parameter.shape for name, parameter in trainer.parameters.items()}
    if {name: tensor.shape for name, tensor in weights.items()} != own:
        raise StateError("it has other parameters than this run trains")
    with torch.no_grad():
        for name, parameter in trainer.parameters.items():
            parameter.copy_(weights[name])


def seed_everything(seed: int) -> None:
    """Start every source of random numbers; for a run that begins at step 0."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def published_tensors(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return what the adapter file holds: float32 on the CPU, by PEFT's names."""
    task = trainer.task
    trained = {
        name: parameter.detach().to("cpu", torch.float32, copy=True).contiguous()
        for name, parameter in trainer.parameters.items()
    }
    return task.method.published(trained, task.method_params)


def head_config(trainer: Trainer, config: JsonObject) -> JsonObject:
    """Return what PEFT has to know of a head: what is put on the base, and what of it is stored."""
    task = trainer.task
    if task.objective.head == "causal_lm":
        return {}
    found: JsonObject = {"task_type": PEFT_TASKS[task.objective.head]}
    heads = head_paths(task.model.get_base_model())
    if heads:
        found |= head_settings(heads, config.get("target_modules"))
    return found


def _taken_up(trainer: Trainer, adapter: Path) -> dict[str, torch.Tensor] | None:
    """Return the trained tensors that the adapter in a directory was made from, if it tells."""
    task = trainer.task
    return task.method.taken_up(load_file(adapter / ADAPTER_TENSORS), task.method_params)


def require_room(trainer: Trainer, directory: Path) -> None:
    """Raise `TrainingFailedError` where a disk has less than twice the room of a checkpoint."""
    n_weights = sum(parameter.numel() for parameter in trainer.parameters.values())
    needed = 2 * (3 * 4 * n_weights + SMALL_FILES_BYTES)
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise TrainingFailedError(
            f"The worker's scratch disk has {free:,} bytes free; a checkpoint needs {needed:,}. "
            "Free some space and start the job again.",
            code="storage_full",
        )


def _optimizer_tensors(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {
        f"{name}:{state}": tensor
        for name, parameter in trainer.parameters.items()
        for state, tensor in optimizers.state_tensors(trainer.optimizer, parameter).items()
    }


def _by_parameter(tensors: dict[str, torch.Tensor]) -> dict[str, optimizers.StateTensors]:
    states: dict[str, optimizers.StateTensors] = {}
    for key, tensor in tensors.items():
        name, _, state = key.rpartition(":")
        states.setdefault(name, {})[state] = tensor
    return states


def _rng_tensors() -> dict[str, torch.Tensor]:
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"cuda.{index}"] = state
    return tensors


def _trainer_state(trainer: Trainer) -> _TrainerState:
    progress = trainer.progress
    epoch, batch = divmod(progress.step, trainer.steps_per_epoch)
    python_version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state()
    name, key, position, has_gauss, cached = numpy_state
    return _TrainerState(
        step=progress.step,
        epoch=epoch,
        batch=batch,
        n_tokens=progress.n_tokens,
        best_valid_loss=progress.best_valid_loss,
        n_without_improvement=progress.n_without_improvement,
        stopped_early=progress.stopped_early,
        python_rng=(python_version, list(words), gauss),
        numpy_rng=(name, key.tolist(), int(position), int(has_gauss), float(cached)),
    )


def _require_fit(
    trainer: Trainer,
    weights: dict[str, torch.Tensor],
    states: dict[str, optimizers.StateTensors],
) -> None:
    shapes = {name: parameter.shape for name, parameter in trainer.parameters.items()}
    if weights.keys() != shapes.keys():
        raise StateError("it belongs to other parameters than this run trains")
    for name, shape in shapes.items():
        if weights[name].shape != shape:
            raise StateError(f"{name} has shape {tuple(weights[name].shape)}")
    try:
        optimizers.require_states(trainer.task.spec.optimizer.type, shapes, states)
    except ValueError as error:
        raise StateError(str(error)) from error
