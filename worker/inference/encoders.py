"""What answers for an encoder: fills masks, classifies, embeds; the adapter is the request's.

Each kind of head is a model of its own around the base's weights, with its adapters on it through
PEFT; requests take turns, each with its adapter switched on.
"""

import copy
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from models.domain.base import JsonObject
from models.domain.encoding import EncodeRequest, EncodeTask
from models.domain.reports import AdapterManifest
from models.errors import InvalidRequestError
from worker.adapter_format import ADAPTER_FILES, invalid_adapter
from worker.base_models import QUANTISED, compute_dtype, dequantise_, load_model
from worker.chat import ChatRenderer
from worker.encode.encoder import Frame, bare_text
from worker.heads import Head, HeadKind, head_paths

if TYPE_CHECKING:
    import torch

TASKS: dict[str, EncodeTask] = {
    "mlm": "fill_mask",
    "classification": "classify",
    "token_classification": "classify",
    "embedding": "embed",
}
"""What adapters of each objective answer."""
HEADS: dict[str, HeadKind] = {
    "mlm": "masked_lm",
    "classification": "sequence_classification",
    "token_classification": "token_classification",
    "embedding": "embedding",
}
_BASE_HEADS: dict[EncodeTask, HeadKind] = {"fill_mask": "masked_lm", "embed": "embedding"}


class _Stage:
    """The base with one kind of head, and the adapters that are on it, oldest use first.

    PEFT puts adapters of one kind on a model, so each kind has modules of its own around the one
    set of the base's weights.
    """

    def __init__(self, model: Any, max_adapters: int) -> None:
        self.has_new_head = bool(head_paths(model))
        self._bare = model
        self._max_adapters = max_adapters
        self._models: dict[str, Any] = {}
        self._adapters: OrderedDict[str, str] = OrderedDict()
        """The kind of each adapter in memory, by its digest."""

    @contextmanager
    def wearing(self, digest: str | None, directory: Path | None) -> Iterator[Any]:
        """Give the model with one adapter switched on, or with none."""
        if digest is None:
            yield self._bare
            return
        if digest not in self._adapters:
            assert directory is not None
            self._load(digest, directory)
        self._adapters.move_to_end(digest)
        model = self._models[self._adapters[digest]]
        model.set_adapter(digest)
        yield model.eval()

    def _load(self, digest: str, directory: Path) -> None:
        from peft import PeftConfig, PeftModel, get_peft_model_state_dict
        from safetensors.torch import load_file

        # Both make their configurations known to PEFT.
        import worker.training.reversible.tuner
        import worker.training.tuners.own  # noqa: F401
        from worker.training.tuners.attach import without_known_warnings

        try:
            with without_known_warnings():
                warnings.filterwarnings("ignore", "Found missing adapter keys")  # looked at below
                kind = str(PeftConfig.from_pretrained(str(directory)).peft_type)
                model = self._models.get(kind)
                if model is None:
                    model = PeftModel.from_pretrained(
                        _with_the_same_weights(self._bare),
                        str(directory),
                        adapter_name=digest,
                        is_trainable=False,
                    )
                else:
                    model.load_adapter(str(directory), digest, is_trainable=False)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise invalid_adapter("does_not_fit", str(error).partition("\n")[0]) from error
        self._models[kind] = model
        self._adapters[digest] = kind
        stored = load_file(directory / ADAPTER_FILES[1])
        found = get_peft_model_state_dict(model, adapter_name=digest, save_embedding_layers=False)
        if stored.keys() != found.keys():
            odd = sorted(stored.keys() ^ found.keys())
            raise invalid_adapter("other_tensors", f"{len(odd)} tensors such as {odd[0]}")
        if len(self._adapters) > self._max_adapters:
            oldest, kind = self._adapters.popitem(last=False)
            if kind not in self._adapters.values():
                del self._models[kind]
                return
            model = self._models[kind]
            if model.active_adapter == oldest:  # the one that goes must not be the active one
                model.set_adapter(next(d for d, k in self._adapters.items() if k == kind))
            model.delete_adapter(oldest)


def _with_the_same_weights(model: Any) -> Any:
    """Return other modules around the very tensors of `model`."""
    shared = {id(each): each for each in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


class EncoderEngine:
    """One encoder on one device. Safe from any thread: requests take turns.

    Args:
        directory: Of the base model.
        precision: How its weights are held.
        device: Where they are.
        chat: Has the tokenizer.
        max_adapters: Most adapters in memory for each kind of head.
    """

    def __init__(
        self,
        directory: Path,
        precision: str,
        device: str,
        chat: ChatRenderer,
        *,
        max_adapters: int,
    ) -> None:
        self._directory = directory
        self._precision = precision
        self._device = device
        self._tokenizer = chat.tokenizer
        self._guard = chat.guard
        self._frame = Frame.of(chat)
        self._max_adapters = max_adapters
        self._stages: dict[tuple[HeadKind, int], _Stage] = {}
        self._lock = Lock()
        self.running = 0

    def run(
        self,
        request: EncodeRequest,
        directory: Path | None = None,
        manifest: AdapterManifest | None = None,
    ) -> tuple[list[JsonObject], int]:
        """Return a result for each input, and how many tokens they have.

        Args:
            request: What is asked.
            directory: Of the adapter's files, if there is one.
            manifest: Of the adapter.

        Raises:
            InvalidRequestError: the adapter was trained for something else, or an input is at
                fault (``param`` is ``model`` or ``input``).
            UnprocessableError: the adapter's files do not fit the base model.
        """
        objective = manifest.objective if manifest is not None else None
        head = self._head(request.task, manifest)
        rows = self._rows(request, objective)
        self.running += 1
        try:
            with self._lock:
                results = self._results(request, head, rows, directory, manifest)
        finally:
            self.running -= 1
        return results, sum(len(ids) for ids, _ in rows)

    def _head(self, task: EncodeTask, manifest: AdapterManifest | None) -> Head:
        if manifest is None:
            if task not in _BASE_HEADS:
                raise InvalidRequestError(
                    "A base model has no classes. Name a fine-tuned classifier as 'model'.",
                    param="model",
                    code="wrong_kind_of_model",
                )
            return Head(_BASE_HEADS[task])
        if TASKS.get(manifest.objective) != task:
            raise InvalidRequestError(
                f"This model was trained with objective '{manifest.objective}', which does not "
                f"answer {task.replace('_', ' ')} requests.",
                param="model",
                code="wrong_kind_of_model",
            )
        params = manifest.objective_params
        if params.get("problem") == "regression":
            return Head(HEADS[manifest.objective], 1)
        return Head(HEADS[manifest.objective], len(params.get("labels", ())))

    def _rows(
        self, request: EncodeRequest, objective: str | None
    ) -> list[tuple[list[int], int | None]]:
        """Return the ids of each input, and how many are of the first text if it has two."""
        if request.pairs is not None and len(request.pairs) != len(request.inputs):
            raise InvalidRequestError(
                f"There are {len(request.inputs)} inputs and {len(request.pairs)} second texts.",
                param="input_pair",
            )
        rows: list[tuple[list[int], int | None]] = []
        for at, given in enumerate(request.inputs):
            if isinstance(given, list):
                rows.append(([*self._frame.before, *given, *self._frame.after], None))
                continue
            if request.task == "fill_mask":
                text = bare_text(given, self._tokenizer)
                encoded = self._guard.encode([text], guarded=False)
            else:
                encoded = self._guard.encode_texts(
                    [given] if request.pairs is None else [given, request.pairs[at]]
                )
            row = self._frame.around(*encoded)
            rows.append((row.input_ids, row.n_first))
        limit = min(int(self._tokenizer.model_max_length), self._max_positions())
        vocabulary = len(self._tokenizer)
        for at, (ids, _) in enumerate(rows):
            if len(ids) > limit:
                raise InvalidRequestError(
                    f"Input {at} has {len(ids)} tokens; this model takes {limit}. Shorten it.",
                    param="input",
                    code="context_length_exceeded",
                )
            if max(ids) >= vocabulary:
                raise InvalidRequestError(
                    f"Input {at} has token {max(ids)}; this model's last is {vocabulary - 1}.",
                    param="input",
                )
        return rows

    def _max_positions(self) -> int:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self._directory, trust_remote_code=False)
        return int(getattr(config, "max_position_embeddings", 0) or 1 << 30)

    def _results(
        self,
        request: EncodeRequest,
        head: Head,
        rows: list[tuple[list[int], int | None]],
        directory: Path | None,
        manifest: AdapterManifest | None,
    ) -> list[JsonObject]:
        import torch

        stage = self._stage(head)
        if manifest is None and stage.has_new_head:
            raise InvalidRequestError(
                "The base model's files have no head for this. Train one and name it as 'model'.",
                param="model",
                code="wrong_kind_of_model",
            )
        results = []
        digest = manifest.digest if manifest is not None else None
        around = torch.autocast(
            torch.device(self._device).type,
            dtype=torch.bfloat16,
            enabled=self._precision != "fp32" and compute_dtype(self._device) == torch.bfloat16,
        )
        with stage.wearing(digest, directory) as model, torch.inference_mode(), around:
            for at, (ids, n_first) in enumerate(rows):
                output = model(**self._inputs(model, ids, n_first))
                results.append(self._result(request, at, ids, output, manifest))
        return results

    def _stage(self, head: Head) -> _Stage:
        key = (head.kind, head.n_outputs)
        if key not in self._stages:
            model = load_model(
                self._directory, precision=self._precision, device=self._device, head=head
            )
            if self._device == "cpu" and self._precision in QUANTISED:
                dequantise_(model)
            self._stages[key] = _Stage(model, self._max_adapters)
        return self._stages[key]

    def _inputs(self, model: Any, ids: list[int], n_first: int | None) -> dict[str, "torch.Tensor"]:
        import torch

        inputs = {
            "input_ids": torch.tensor([ids], device=self._device),
            "attention_mask": torch.ones(1, len(ids), dtype=torch.int64, device=self._device),
        }
        if n_first is not None and getattr(model.config, "type_vocab_size", 0) > 1:
            segments = [0] * n_first + [1] * (len(ids) - n_first)
            inputs["token_type_ids"] = torch.tensor([segments], device=self._device)
        return inputs

    def _result(
        self,
        request: EncodeRequest,
        at: int,
        ids: list[int],
        output: Any,
        manifest: AdapterManifest | None,
    ) -> JsonObject:
        if request.task == "embed":
            vector = output.last_hidden_state[0].float().mean(0)
            return {"embedding": (vector / vector.norm().clamp(min=1e-12)).tolist()}
        logits = output.logits[0].float()
        if request.task == "fill_mask":
            return self._fillings(at, ids, logits, request.top_k)
        assert manifest is not None
        if manifest.objective == "token_classification":
            given = request.inputs[at]
            if not isinstance(given, str):
                raise InvalidRequestError("Words are labelled in a text.", param="input")
            return self._tags(given, manifest.objective_params["labels"], logits)
        return classes(logits, manifest.objective_params)

    def _fillings(self, at: int, ids: list[int], logits: "torch.Tensor", top_k: int) -> JsonObject:
        """Return the likeliest tokens of each mask, and the text with the first in its place."""
        mask = self._tokenizer.mask_token
        places = [
            place for place, token in enumerate(ids) if token == self._tokenizer.mask_token_id
        ]
        if mask is None or not places:
            raise InvalidRequestError(
                f"Input {at} has no mask. Write {mask or '[MASK]'} where a word is missing.",
                param="input",
                code="no_mask",
            )
        masks, filled = [], list(ids)
        for place in places:
            best = logits[place].softmax(-1).topk(top_k)
            found = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            masks.append(
                [
                    {
                        "token": token,
                        "text": str(self._tokenizer.decode([token])).strip(),
                        "probability": probability,
                    }
                    for token, probability in found
                ]
            )
            filled[place] = int(best.indices[0])
        text = str(self._tokenizer.decode(filled, skip_special_tokens=True))
        return {"masks": masks, "text": text.strip()}

    def _tags(self, text: str, labels: Sequence[str], logits: "torch.Tensor") -> JsonObject:
        """Return the label of each word: that of its first token."""
        words = text.split()
        pieces = self._guard.encode_texts(
            [word if at == 0 else f" {word}" for at, word in enumerate(words)]
        )
        found, place = [], len(self._frame.before)
        for word, piece in zip(words, pieces, strict=True):
            if not piece.ids:
                continue
            best = logits[place].softmax(-1).max(-1)
            found.append(
                {"word": word, "label": labels[int(best.indices)], "score": float(best.values)}
            )
            place += len(piece.ids)
        return {"words": found}


def classes(logits: "torch.Tensor", params: JsonObject) -> JsonObject:
    """Return what the logits [C] of a classifier say: label and scores, labels, or a number."""
    problem, labels = params.get("problem"), params.get("labels", [])
    if problem == "regression":
        return {"value": float(logits[0])}
    if problem == "multi":
        scores = dict(zip(labels, logits.sigmoid().tolist(), strict=True))
        return {"labels": [name for name in labels if scores[name] > 0.5], "scores": scores}
    scores = dict(zip(labels, logits.softmax(-1).tolist(), strict=True))
    best = max(scores, key=lambda name: scores[name])
    return {"label": best, "score": scores[best], "scores": scores}
