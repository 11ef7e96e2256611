"""A strict reader of PEFT LoRA directories: every tensor is used exactly once, or none is."""

import json
import logging
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from worker.inference.engine.adapter_config import LoraConfig, read_config
from worker.inference.engine.errors import AdapterFormatError
from worker.inference.engine.params import AdapterWeights, LinearShape, LoraWeights

MAX_HEADER_BYTES = 1024**2
MAX_TENSORS = 10_000
logger = logging.getLogger(__name__)

_DTYPES = {"F32", "F16", "BF16"}
_KEY = re.compile(r"base_model\.model\.(?P<path>[A-Za-z0-9_.]+)\.lora_(?P<side>[AB])\.weight")


def read_adapter(
    directory: Path, digest: str, linears: Mapping[str, LinearShape]
) -> AdapterWeights:
    """Read ``adapter_config.json`` and ``adapter_model.safetensors`` of one LoRA adapter.

    Args:
        directory: Where the two files are.
        digest: The identity that the result carries.
        linears: The base model's linear layers by full path.

    Returns:
        Float32 tensors on the CPU, one pair for every linear layer that the configuration targets.

    Raises:
        AdapterFormatError: anything is missing, left over, of another shape, not finite, or asks
            for a feature that is not served.
    """
    config = read_config(directory / "adapter_config.json")
    file = directory / "adapter_model.safetensors"
    shapes = _read_header(file)
    pairs = _pair_up(shapes)
    _check_targets(config, pairs, linears)
    for path, keys in pairs.items():
        _check_shapes(config, path, (shapes[keys["A"]], shapes[keys["B"]]), linears[path])
    tensors = _read_tensors(file)
    if not any(bool(tensors[keys["B"]].any()) for keys in pairs.values()):
        # Sound, as after a first step with learning rate 0; yet hardly what anybody wants to serve.
        logger.warning("Adapter %s changes nothing: every B matrix is zero.", digest)
    return AdapterWeights(
        digest,
        {
            path: LoraWeights(tensors[keys["A"]], tensors[keys["B"]], config.scale(path))
            for path, keys in pairs.items()
        },
    )


def _read_header(file: Path) -> dict[str, list[int]]:
    """Return the shape of every tensor, from the header alone.

    The header is checked before the library parses it: a small file may claim a huge one.
    """
    try:
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= MAX_HEADER_BYTES:
                raise AdapterFormatError(
                    "bad_tensors", f"its header has {length} bytes, not 2 to {MAX_HEADER_BYTES}"
                )
            header = json.loads(stream.read(length), object_pairs_hook=_without_duplicates)
    except FileNotFoundError:
        raise AdapterFormatError(
            "missing_file", "there is no adapter_model.safetensors; pickled weights are not loaded"
        ) from None
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError("bad_tensors", f"its header is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise AdapterFormatError("bad_tensors", "its header is no JSON object")
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise AdapterFormatError(
            "bad_tensors", f"it has {len(header)} tensors, more than {MAX_TENSORS}"
        )
    shapes = {}
    for key, entry in header.items():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if not isinstance(shape, list):
            raise AdapterFormatError("bad_tensors", f"{key!r} has no shape")
        if entry.get("dtype") not in _DTYPES:
            raise AdapterFormatError(
                "bad_dtype", f"{key!r} has dtype {entry.get('dtype')!r}, not one of F32, F16, BF16"
            )
        shapes[key] = shape
    return shapes


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _pair_up(shapes: Mapping[str, list[int]]) -> dict[str, dict[str, str]]:
    """Return, for every module path, the keys of its A and B; each key belongs to one pair."""
    pairs: dict[str, dict[str, str]] = {}
    for key in shapes:
        match = _KEY.fullmatch(key)
        if match is None:
            raise AdapterFormatError(
                "unknown_tensor",
                f"{key!r} is no LoRA matrix (base_model.model.PATH.lora_A.weight, or B)",
            )
        pairs.setdefault(match["path"], {})[match["side"]] = key
    for path, keys in pairs.items():
        for side in ("A", "B"):
            if side not in keys:
                raise AdapterFormatError("missing_tensor", f"{path!r} has no lora_{side}")
    if not pairs:
        raise AdapterFormatError("no_effect", "it has no tensors: the adapter changes nothing")
    return pairs


def _check_targets(
    config: LoraConfig, pairs: Mapping[str, Any], linears: Mapping[str, LinearShape]
) -> None:
    for path in pairs:
        if path not in linears:
            raise AdapterFormatError(
                "unknown_module", f"the base model has no linear layer {path!r}"
            )
        if not config.targets(path, linears[path]):
            raise AdapterFormatError(
                "unknown_module", f"{path!r} has tensors, but target_modules does not name it"
            )
    for path, shape in linears.items():
        if path not in pairs and config.targets(path, shape):
            raise AdapterFormatError(
                "missing_tensor", f"target_modules names {path!r}, but it has no tensors"
            )


def _check_shapes(
    config: LoraConfig, path: str, found: tuple[list[int], list[int]], linear: LinearShape
) -> None:
    rank = config.rank(path)
    expected = ([rank, linear.in_features], [linear.out_features, rank])
    for side, has, should in zip("AB", found, expected, strict=True):
        if has != should:
            raise AdapterFormatError(
                "shape_mismatch", f"lora_{side} of {path!r} has shape {has}, expected {should}"
            )


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    try:
        with safe_open(file, framework="pt") as archive:
            for key in archive.keys():  # noqa: SIM118 (safe_open is no mapping)
                # PEFT serves float32 whatever the file holds; a copy lets go of the mapped file.
                tensors[key] = archive.get_tensor(key).to(torch.float32, copy=True)
    except SafetensorError as error:
        raise AdapterFormatError("bad_tensors", str(error)) from error
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterFormatError("not_finite", f"{key!r} holds NaN or Infinity")
    return tensors
