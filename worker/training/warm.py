"""A base model that a waiting trainer has loaded before it knows its job: that of the last one."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from models.domain.training import Precision
from models.errors import TuneryError
from models.settings import Settings
from models.storage import open_store
from worker.heads import Head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = structlog.get_logger(__name__)

MEMORY_SHARE = 0.25
"""Weights that take more of the free memory than this are loaded only for a job."""
BYTES_PER_PARAMETER = {"fp32": 4}
"""Two in every other precision, at least while it is being loaded."""


@dataclass(slots=True)
class WarmBase:
    """Holds one base model, or none, until it is taken."""

    _fingerprint: str = ""
    _precision: Precision | None = None
    _model: "PreTrainedModel | None" = None

    def load(self, settings: Settings, name: str, precision: Precision) -> None:
        """Load base model `name` on a CPU, if there is ample memory; a GPU's is not held for later.

        What goes wrong is left for the job that needs this model to find.
        """
        from worker.base_models import load_model, load_tokenizer, materialise, pick_device
        from worker.training.memory import free_bytes

        device = pick_device("auto")
        if device != "cpu":
            return
        try:
            directory, base = materialise(name, settings.models, open_store(settings.storage))
            needed = base.n_parameters * BYTES_PER_PARAMETER.get(precision.type, 2)
            if needed > MEMORY_SHARE * free_bytes(device):
                log.info("base_not_warmed", base_model=name, needed_bytes=needed)
                return
            load_tokenizer(directory)  # for what it imports
            self._model = load_model(
                directory,
                precision=precision.type,
                double_quant=precision.double_quant,
                device=device,
                head=Head(),
            )
        except (TuneryError, OSError, ValueError, RuntimeError) as error:
            log.warning("base_not_warmed", base_model=name, error=str(error))
            return
        self._fingerprint, self._precision = base.fingerprint, precision
        log.info("base_warmed", base_model=name, precision=precision.type)

    def take(self, fingerprint: str, precision: Precision, head: Head) -> "PreTrainedModel | None":
        """Give the model away if it is the one that is meant; else drop it and return None."""
        model, self._model = self._model, None
        fits = (self._fingerprint, self._precision) == (fingerprint, precision)
        return model if fits and head.kind == Head().kind else None
