"""Which head a base model is loaded with: by objective, and by what the model's files have.

A head whose weights are not in the base model's files is new: it is drawn from a seed, trained in
float32 whatever the method, and stored with the adapter (PEFT's ``modules_to_save``).
"""

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from models.domain.estimates import Family

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

HeadKind = Literal[
    "causal_lm",
    "masked_lm",
    "seq2seq_lm",
    "sequence_classification",
    "token_classification",
    "embedding",
]

AUTO_CLASSES: dict[HeadKind, str] = {
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "seq2seq_lm": "AutoModelForSeq2SeqLM",
    "sequence_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "embedding": "AutoModel",
}
PEFT_TASKS: dict[HeadKind, str | None] = {
    "causal_lm": "CAUSAL_LM",
    "masked_lm": None,
    "seq2seq_lm": "SEQ_2_SEQ_LM",
    "sequence_classification": None,
    "token_classification": None,
    "embedding": "FEATURE_EXTRACTION",
}
"""What PEFT calls it in ``adapter_config.json``."""

COPIES = "modules_to_save"
"""PEFT's name of the copies of a head that adapters have; it is not in the adapter file."""
_NEW = "is_new_head"
"""Marks the modules that the base model's files have no weights for."""


@dataclass(frozen=True, slots=True)
class Head:
    """A kind of head; `n_outputs` where it is not the vocabulary, `seed` of what is new in it."""

    kind: HeadKind = "causal_lm"
    n_outputs: int = 0
    seed: int = 0


def family_of(config: "PretrainedConfig") -> Family:
    """Return what a model is by its configuration: never by its name.

    What transformers has a masked-language-model head for and is no decoder is an encoder.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if getattr(config, "is_encoder_decoder", False):
        return "encoder_decoder"
    is_masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return "encoder" if is_masked and not getattr(config, "is_decoder", False) else "decoder"


def load(directory: Path, head: Head, device: str, options: dict[str, Any]) -> "PreTrainedModel":
    """Load the model in `directory` with `head`; new modules of it are float32 and trainable.

    Args:
        directory: In Hugging Face layout.
        head: What is put on it.
        device: Where it goes.
        options: Of ``from_pretrained``: dtype and quantisation.
    """
    import torch
    import transformers

    auto = getattr(transformers, AUTO_CLASSES[head.kind])
    if head.n_outputs:
        options = {**options, "num_labels": head.n_outputs, "ignore_mismatched_sizes": True}
    if head.kind == "embedding":
        options = {**options, **_without_pooler(directory)}
    if "quantization_config" in options and head.kind != "causal_lm":
        options["quantization_config"].llm_int8_skip_modules = _above_backbone(directory, head)
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # new weights are no mishap here
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            torch.manual_seed(head.seed)
            model, found = auto.from_pretrained(
                directory,
                device_map={"": device},
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
    model.requires_grad_(False)
    absent = {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}
    if head.n_outputs:  # classes are the job's own, even if the files have as many
        prefix = f"{model.base_model_prefix}."
        absent |= {name for name, _ in model.named_parameters() if not name.startswith(prefix)}
    for module in _new_modules(model, absent):
        module.float().requires_grad_(True)
        setattr(module, _NEW, True)
    loaded: PreTrainedModel = model.eval()
    return loaded


def _without_pooler(directory: Path) -> dict[str, bool]:
    """Return the option that leaves out a pooler, where there is one: the mean needs none."""
    import inspect

    from transformers import MODEL_MAPPING, AutoConfig

    kind: Any = MODEL_MAPPING[type(AutoConfig.from_pretrained(directory, trust_remote_code=False))]
    takes = "add_pooling_layer" in inspect.signature(kind).parameters
    return {"add_pooling_layer": False} if takes else {}


def _new_modules(model: "nn.Module", absent: set[str]) -> "list[nn.Module]":
    """Return the smallest modules with weights that the files lack; never the output embeddings.

    These are tied to the input's, and their bias starts at 0, whatever the seed.
    """
    outputs = model.get_output_embeddings()  # type: ignore[operator]
    paths = {key.rpartition(".")[0] for key in absent}
    return [
        module
        for path, module in model.named_modules()
        if path in paths and module is not outputs and not list(module.children())
    ]


def head_paths(model: "nn.Module") -> list[str]:
    """Return the paths of a base's modules that are trained whatever the method: its new head."""
    return [
        path
        for path, module in model.named_modules()
        if hasattr(module, _NEW) and COPIES not in path and not path.endswith(".original_module")
    ]


def head_settings(heads: list[str], targets: object) -> dict[str, Any]:
    """Return what PEFT's configuration of an adapter says of new heads: stored whole, not adapted.

    Args:
        heads: Of `head_paths`.
        targets: The configuration's ``target_modules``: names, a pattern, or nothing.
    """
    settings: dict[str, Any] = {"modules_to_save": heads}
    if isinstance(targets, str):
        meant = [path for path in heads if re.fullmatch(targets, path)]
    else:
        given = targets if isinstance(targets, list | set | tuple) else []
        kept = sorted(each for each in given if each not in heads)
        if kept:
            settings["target_modules"] = kept
        meant = [path for path in heads if any(f".{path}".endswith(f".{name}") for name in kept)]
    return settings | ({"exclude_modules": meant} if meant else {})


def _above_backbone(directory: Path, head: Head) -> list[str]:
    """Return the names of what is not quantised: everything above the backbone, and its pooler."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
    with torch.device("meta"):
        model = getattr(transformers, AUTO_CLASSES[head.kind]).from_config(config)
    prefix = model.base_model_prefix
    names = [name for name, _ in model.named_children() if name != prefix]
    if model.base_model is model:  # the backbone has no name of its own
        names = ["lm_head"]
    return [*names, "pooler"]
