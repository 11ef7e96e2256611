"""A base model that a waiting trainer has loaded before it knows its job: that of the last one.

On a CPU it carries the last job's kind of adapter already (``rehearsal``), for a job like it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from models.domain.base import JsonObject
from models.domain.training import Precision, TrainingSpec
from models.errors import TuneryError
from models.settings import Settings
from models.storage import open_store
from worker.heads import Head

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from worker.training.rehearsal import Rehearsed

log = structlog.get_logger(__name__)

MEMORY_SHARE = 0.25
"""Weights that take more of the free memory than this are loaded only for a job."""
BYTES_PER_PARAMETER = {"fp32": 4}
"""Two in every other precision, at least while it is being loaded."""
_Place = tuple[Path, int, int]


@dataclass(slots=True)
class WarmBase:
    """Holds one base model, or none, until it is taken; and its tokenizer."""

    _fingerprint: str = ""
    _precision: Precision | None = None
    _model: "PreTrainedModel | Rehearsed | None" = None
    _tokenizer: "PreTrainedTokenizerBase | None" = None
    _place: _Place | None = None

    def load(
        self,
        settings: Settings,
        name: str,
        precision: Precision,
        peft: JsonObject | None = None,
        is_wanted: Callable[[], bool] = lambda: False,
    ) -> None:
        """Load base model `name` on a CPU, if there is ample memory; a GPU's is not held for later.

        What goes wrong is left for the job that needs this model to find.

        Args:
            settings: Of this process.
            name: The base model.
            precision: How to hold it.
            peft: Method and parameters of an adapter to rehearse with.
            is_wanted: Tells whether a job waits already, which ends the preparations.
        """
        from worker.base_models import load_tokenizer, materialise, pick_device
        from worker.training import objectives
        from worker.training.memory import free_bytes
        from worker.training.model import load_base

        objectives.resolve({"type": "sft"})  # for what it imports
        device = pick_device("auto")
        if device != "cpu":
            return
        try:
            directory, base = materialise(name, settings.models, open_store(settings.storage))
            needed = base.n_parameters * BYTES_PER_PARAMETER.get(precision.type, 2)
            if needed > MEMORY_SHARE * free_bytes(device):
                log.info("base_not_warmed", base_model=name, needed_bytes=needed)
                return
            self._tokenizer, self._place = load_tokenizer(directory), _place(directory)
            self._model = load_base(directory, precision, device)
        except (TuneryError, OSError, ValueError, RuntimeError) as error:
            log.warning("base_not_warmed", base_model=name, error=str(error))
            return
        self._fingerprint, self._precision = base.fingerprint, precision
        log.info("base_warmed", base_model=name, precision=precision.type)
        if peft is not None and not is_wanted():
            self._rehearse(precision, peft, device)

    def _rehearse(self, precision: Precision, peft: JsonObject, device: str) -> None:
        from worker.training.rehearsal import rehearse

        base, self._model = self._model, None  # an error leaves it half done
        assert base is not None
        assert self._tokenizer is not None
        pad_id = int(self._tokenizer.pad_token_id or 0)
        try:
            self._model = rehearse(base, precision, peft, device, pad_id)  # type: ignore[arg-type]
        except (TuneryError, OSError, ValueError, RuntimeError) as error:
            log.warning("not_rehearsed", error=str(error))
            return

    def take(self, fingerprint: str, precision: Precision, head: Head) -> "PreTrainedModel | None":
        """Give the model away if it is the one that is meant; else drop it and return None."""
        from worker.training.rehearsal import Rehearsed

        model, self._model = self._model, None
        fits = (self._fingerprint, self._precision) == (fingerprint, precision)
        if model is None or not fits or head.kind != Head().kind:
            return None
        return model.strip() if isinstance(model, Rehearsed) else model

    def take_rehearsed(self, fingerprint: str, spec: TrainingSpec) -> "Rehearsed | None":
        """Give away the model with its adapter, as new, if a job wants just these; else None."""
        from worker.training import methods
        from worker.training.rehearsal import Rehearsed

        model = self._model
        if (
            not isinstance(model, Rehearsed)
            or (self._fingerprint, self._precision) != (fingerprint, spec.precision)
            or model.params != methods.parse_params(spec.peft)
            or not spec.packing
            or spec.num_devices > 1
        ):
            return None
        self._model = None
        model.draw(spec.seed)
        return model

    def tokenizer(self, directory: Path) -> "PreTrainedTokenizerBase":
        """Return the tokenizer in `directory`: the one that is held, or loaded."""
        from worker.base_models import load_tokenizer

        held, self._tokenizer = self._tokenizer, None
        return held if held and self._place == _place(directory) else load_tokenizer(directory)


def _place(directory: Path) -> _Place:
    """Return what tells a directory from one that was put in its place."""
    found = directory.stat()
    return directory, found.st_ino, found.st_mtime_ns
