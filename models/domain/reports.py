"""What a worker reports: findings in a data set, metrics of a step, the manifest of an adapter."""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from models.domain.base import Frozen, JsonObject, Parameters, Text


class RowFinding(Frozen):
    """One fault of a data set.

    `line` counts from 1; `path` is the place inside the row, e.g. ``messages[1].role``; `offset` is
    the position of the row's first byte in the decompressed file, where the format has one. Rows
    with a warning are usable.
    """

    line: int
    code: str
    message: str
    path: str = ""
    hint: str = ""
    offset: int | None = None
    level: Literal["error", "warning"] = "error"

    def sentence(self) -> str:
        return f"{self.statement()} {self.hint}".rstrip()

    def statement(self) -> str:
        """Return where and what, without the remedy."""
        where = f"Line {self.line}" + (f", {self.path}" if self.path else "")
        return f"{where}: {self.message}"


def tell(findings: Sequence[RowFinding], n_findings: int, max_length: int | None = None) -> str:
    """Return findings as one text of at most about `max_length` characters.

    Neighbours with one remedy have it once, after the last of them; `n_findings`, how many there
    are in all, is told where that is more than the text has.
    """
    parts: list[str] = []
    length, hint = 0, ""
    for n_told, finding in enumerate(findings):
        remedy = [hint] if hint and finding.hint != hint else []
        length += sum(len(part) + 1 for part in (*remedy, finding.statement()))
        if max_length is not None and length + len(finding.hint) > max_length:
            findings = findings[:n_told]
            break
        parts += [*remedy, finding.statement()]
        hint = finding.hint
    if findings and hint:
        parts.append(hint)
    if findings and n_findings > len(findings):
        parts.append(f"({n_findings:,} errors in all.)")
    return " ".join(parts)


class DataOptions(Parameters):
    """How the owner of a data set wants it read; what is empty is detected.

    `columns` maps our field names to the file's, e.g. ``{"messages": "conversations"}``.
    """

    shape: Text = ""
    columns: dict[Text, Text] = Field(default_factory=dict)


class DatasetReport(Frozen):
    """The result of linting one file.

    `findings` (errors) and `warnings` hold the first 50 of each, `n_findings` and `n_warnings`
    count all, `counts` does so by code. `format` is what the bytes are (``jsonl``, ``csv`` …),
    `shape` what the rows look like (``openai_chat``, ``alpaca`` …), `form` what they became
    (``chat``, ``preference`` …); `evidence` says in sentences why. `columns` maps our field names
    to the file's. `labels` counts the labels of classification rows. `data_sha256` is the digest
    of the usable rows, if they were kept: spaces, line ends, order of keys and compression do not
    change it.
    """

    n_rows: int
    n_valid_rows: int
    n_findings: int = 0
    findings: list[RowFinding] = Field(default_factory=list)
    n_warnings: int = 0
    warnings: list[RowFinding] = Field(default_factory=list)
    counts: dict[str, int] = Field(default_factory=dict)
    format: str = ""
    container: str = ""
    shape: str = ""
    form: str = ""
    columns: dict[str, str] = Field(default_factory=dict)
    evidence: list[str] = Field(default_factory=list)
    labels: dict[str, int] = Field(default_factory=dict)
    labels_are_cut: bool = False
    data_sha256: str = ""


MAX_FINDINGS = 50


class StepMetrics(Frozen):
    """Metrics of one optimizer step; losses are means over trained tokens, in nats.

    ``valid_*`` come from a small batch at the step, ``full_valid_*`` from the whole validation
    split (OpenAI's names). `recorded_at` is when the step was done, in seconds since 1970 by the
    clock of its worker; steps of older versions have none.
    """

    step: int
    epoch: float
    train_loss: float
    train_mean_token_accuracy: float
    learning_rate: float
    grad_norm: float
    tokens: int
    trained_tokens: int
    tokens_per_second: float
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None
    full_valid_loss: float | None = None
    full_valid_mean_token_accuracy: float | None = None
    recorded_at: float | None = None


class ManifestFile(Frozen):
    name: str
    bytes: int
    sha256: str


class AdapterManifest(Frozen):
    """What an adapter is made of and what it needs; stored beside its tensors, written last.

    `digest` is the sha256 over the adapter's own files (see ``worker/training/publish.py``); it is
    the adapter's identity everywhere: slot, cache directory, ``system_fingerprint``.
    `chat_template` is the source that its rows were rendered with (of several named ones, JSON);
    it and the tokenizer's digest tell for ever what text the adapter was taught in. `served` says
    whether it runs in one batch with others, merged into a base of its own, or beside its modules.
    `objective_params` has the labels of a classifier, in the order of its outputs. Of an adapter
    that came from outside, all that is not known is empty, and `objective` is ``imported``.
    """

    format: Literal["tunery-adapter-1"] = "tunery-adapter-1"
    digest: str
    files: list[ManifestFile]
    base_model: str
    base_fingerprint: str
    vocab_size: int
    template_sha256: str
    chat_template: str = ""
    tokenizer_sha256: str = ""
    method: str
    served: Literal["batched", "merged", "own"] = "batched"
    objective: str
    objective_params: JsonObject = Field(default_factory=dict)
    precision: JsonObject
    step: int
    spec_sha256: str
    data_sha256: str
    versions: dict[str, str]


class CheckpointManifest(Frozen):
    """The complete, resumable state of a job after `step`, written after all its objects."""

    format: Literal["tunery-checkpoint-1"] = "tunery-checkpoint-1"
    job_id: str
    attempt: int
    step: int
    adapter_digest: str
    spec_sha256: str
    files: list[ManifestFile]
    versions: dict[str, str]
