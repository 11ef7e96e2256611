"""``python -m worker.training.merge MERGE_ID PARENT_PID``: an adapter and its base as one model.

The adapter is added in float32 to the weights that it was trained on: those of a 4-bit base are
dequantised, never the ones from before the quantisation, and the sum is stored in 16 bits (specs:
methods, finding 5). The result is a zip archive of what transformers and other servers read.
"""

import hashlib
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
import torch

from models.db import Database
from models.domain.base import JsonObject
from models.domain.status import FileStatus
from models.domain.training import Precision
from models.errors import TuneryError, UnprocessableError
from models.logs import configure_logging
from models.processes import die_with_parent
from models.registry import files, merges, quotas
from models.settings import Settings, load_settings
from models.storage import ObjectNotFoundError, ObjectStore, open_store, upload_key
from models.tables import Adapter, File, Merge, new_id
from worker.adapter_format import fetch_adapter
from worker.base_models import QUANTISED, dequantise_, load_model, load_tokenizer, materialise
from worker.inference.own_model import with_adapter
from worker.training.model import set_threads

if TYPE_CHECKING:
    from peft import PeftModel

PURPOSE = "fine-tune-results"
TOLERANCE = 1e-4
"""Largest relative error of the logits, in float32, that merging may bring."""
SHARD_SIZE = "4GB"
CHUNK = 1024 * 1024
_PROBE_TOKENS = 32

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Errors:
    """Relative errors of the logits of a few tokens against the unmerged model, in float32."""

    merged: float
    rounded: float


def merge_weights(base: Path, adapter: Path, target: Path, precision: JsonObject) -> Errors:
    """Write base and adapter as one 16-bit model with its tokenizer to a new directory.

    Args:
        base: Directory of the base model.
        adapter: Directory of the adapter.
        target: Where to.
        precision: How the base was held in training, a dumped ``Precision``; empty is bf16.

    Raises:
        UnprocessableError: the adapter does not fit the base, or what is merged answers otherwise.
    """
    held = Precision.model_validate({"type": "bf16"} | precision)
    model = load_model(base, precision=held.type, double_quant=held.double_quant, device="cpu")
    if held.type in QUANTISED:
        dequantise_(model)
    try:
        adapted = with_adapter(model.float(), adapter, "cpu").eval()
    except (KeyError, RuntimeError, ValueError) as error:
        raise _refused(str(error)) from error
    n_words = int(model.config.vocab_size)
    ids = torch.arange(_PROBE_TOKENS)[None] * 7919 % n_words
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits.float()
        whole = _merged(adapted)
        merged = _error(whole(input_ids=ids).logits, expected)
        if not merged <= TOLERANCE:
            raise _refused(f"merged, its logits differ by {merged:.1e}")
        whole = whole.to(torch.bfloat16)
        whole.save_pretrained(target, max_shard_size=SHARD_SIZE)
        rounded = _error(whole.float()(input_ids=ids).logits, expected)
    load_tokenizer(base).save_pretrained(target)
    return Errors(merged, rounded)


def _merged(adapted: "PeftModel") -> Any:
    try:
        return adapted.merge_and_unload()
    except (NotImplementedError, TypeError, ValueError) as error:  # what PEFT's tuners raise
        raise _refused(str(error)) from error


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


def _refused(why: str) -> UnprocessableError:
    return UnprocessableError(
        f"The adapter cannot be merged: {why}.", param="model", code="not_mergeable"
    )


def make(settings: Settings, database: Database, store: ObjectStore, merge_id: str) -> None:
    """Make a merged model and end its row; a refusal is written there too.

    Raises:
        OSError, SQLAlchemyError: something is out of order that another try may not meet.
    """
    root = settings.worker.scratch_dir.expanduser().resolve()
    root.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="merge-", dir=root))
    try:
        _make(settings, database, store, merge_id, scratch)
    except (TuneryError, ObjectNotFoundError) as error:
        log.warning("merge_failed", merge_id=merge_id, error=str(error))
        with database.write() as session:
            merges.fail(session, merge_id, str(error))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _make(
    settings: Settings, database: Database, store: ObjectStore, merge_id: str, scratch: Path
) -> None:
    with database.read() as session:
        merge = session.get_one(Merge, merge_id)
        adapter = session.get_one(Adapter, merge.model)
    directory, info = materialise(adapter.base_model, settings.models, store)
    if info.fingerprint != adapter.manifest["base_fingerprint"]:
        raise _refused("the base model has changed since it was trained")
    fetch_adapter(store, adapter.digest, scratch / "adapter")
    precision = adapter.manifest["precision"]
    errors = merge_weights(directory, scratch / "adapter", scratch / "merged", precision)
    log.info("merged", merge_id=merge_id, error=errors.merged, rounded=errors.rounded)
    archive = scratch / "merged.zip"
    _pack(scratch / "merged", archive)
    file = File(
        id=new_id("file-"),
        project_id=merge.project_id,
        purpose=PURPOSE,
        filename=f"{adapter.name.replace(':', '-')}-merged.zip",
        bytes=archive.stat().st_size,
        sha256=_sha256(archive),
        status=FileStatus.PROCESSED,
    )
    file.object_key = upload_key(file.id)
    store.put(file.object_key, _chunks(archive))
    try:
        with database.write() as session:
            quotas.check_bytes(session, merge.project_id, file.bytes)
            files.create(session, file)
            merges.succeed(session, merge_id, file.id)
    except BaseException:
        store.delete(upload_key(file.id))
        raise


def _pack(directory: Path, target: Path) -> None:
    """Write a directory's files to a zip archive, not compressed: weights do not get smaller."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(directory.iterdir()):
            archive.write(path, path.name)
            path.unlink()  # never twice on the disk


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as source:
        while chunk := source.read(CHUNK):
            yield chunk


def _sha256(path: Path) -> str:
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def main() -> int:
    merge_id, parent = sys.argv[1:]
    die_with_parent(int(parent))
    settings = load_settings()
    configure_logging(settings.log_level, "merge")
    set_threads(settings.worker.slots)
    database = Database(settings.database)
    try:
        make(settings, database, open_store(settings.storage), merge_id)
    finally:
        database.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
