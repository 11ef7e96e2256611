"""A strict reader of PEFT adapter directories: every tensor is used exactly once, or none is."""

import json
import logging
import math
import mmap
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from worker.inference.engine.adapter_config import read_config
from worker.inference.engine.errors import AdapterFormatError
from worker.inference.engine.methods.base import Method
from worker.inference.engine.params import ModuleShape
from worker.inference.engine.weights import AdapterWeights, BaseLinear

MAX_HEADER_BYTES = 1024**2
MAX_TENSORS = 10_000
logger = logging.getLogger(__name__)

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_KEY = re.compile(
    r"base_model\.model\.(?P<path>[A-Za-z0-9_.]+?)\.(?P<name>(?:lora|ia3|own|meft)_[A-Za-z0-9_.]+)"
)


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """A checked adapter as its files hold it: float32 tensors by module path and name."""

    digest: str
    method: Method
    modules: Mapping[str, Mapping[str, torch.Tensor]]

    def weights(self, base: Callable[[str], BaseLinear]) -> AdapterWeights:
        """Return what it does to the layers of the base model, whose weights `base` gives by path.

        Raises:
            AdapterFormatError: a gain that follows from both is not finite.
        """
        modules = {
            path: self.method.change(path, tensors, base) for path, tensors in self.modules.items()
        }
        for path, change in modules.items():
            stored = {id(tensor) for tensor in self.modules[path].values()}  # known to be finite
            for name, tensor in change.tensors().items():
                if id(tensor) not in stored and not _is_finite(tensor):
                    raise AdapterFormatError("not_finite", f"the {name} of {path!r} is not finite")
        if all(change.changes_nothing() for change in modules.values()):
            # Sound, as after a first step with learning rate 0; yet hardly what anybody wants.
            logger.warning("Adapter %s changes nothing of the base model.", self.digest)
        return AdapterWeights(self.digest, modules)


def read_adapter(directory: Path, digest: str, parts: Mapping[str, ModuleShape]) -> StoredAdapter:
    """Read ``adapter_config.json`` and ``adapter_model.safetensors`` of one adapter.

    Args:
        directory: Where the two files are.
        digest: The identity that the result carries.
        parts: What may be changed of the base model, by full path.

    Returns:
        Float32 tensors on the CPU, for every module that the configuration targets.

    Raises:
        AdapterFormatError: anything is missing, left over, of another shape, not finite, or asks
            for a feature that is not served.
    """
    method = read_config(directory / "adapter_config.json")
    file = directory / "adapter_model.safetensors"
    header = _read_header(file)
    shapes = {key: entry["shape"] for key, entry in header.tensors.items()}
    modules = _group(shapes, method)
    _check_targets(method, modules, parts)
    for path, keys in modules.items():
        expected = method.shapes(path, parts[path])
        for name in keys.keys() - expected.keys():
            raise AdapterFormatError("unknown_tensor", f"{path!r} has {name}, which it must not")
        for name, should in expected.items():
            if name not in keys:
                raise AdapterFormatError("missing_tensor", f"{path!r} has no {name}")
            if (has := shapes[keys[name]]) != should:
                raise AdapterFormatError(
                    "shape_mismatch", f"{name} of {path!r} has shape {has}, expected {should}"
                )
    tensors = _read_tensors(file, header)
    return StoredAdapter(
        digest,
        method,
        {
            path: {name: tensors[key] for name, key in keys.items()}
            for path, keys in modules.items()
        },
    )


@dataclass(frozen=True, slots=True)
class _Header:
    """What the head of a file says of each tensor, and where in the file their bytes begin."""

    tensors: dict[str, dict[str, Any]]
    n_bytes: int


def _read_header(file: Path) -> _Header:
    """Return what the header alone says.

    It is checked before the library parses it: a small file may claim a huge one.
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
    for key, entry in header.items():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if not isinstance(shape, list):
            raise AdapterFormatError("bad_tensors", f"{key!r} has no shape")
        if entry.get("dtype") not in _DTYPES:
            raise AdapterFormatError(
                "bad_dtype", f"{key!r} has dtype {entry.get('dtype')!r}, not one of F32, F16, BF16"
            )
    return _Header(header, len(prefix) + length)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _group(shapes: Mapping[str, Any], method: Method) -> dict[str, dict[str, str]]:
    """Return, for every module path, its keys by name; each key belongs to one module."""
    modules: dict[str, dict[str, str]] = {}
    for key in shapes:
        match = _KEY.fullmatch(key)
        if match is None or match["name"] not in method.names:
            names = ", ".join(sorted(method.names))
            raise AdapterFormatError(
                "unknown_tensor", f"{key!r} is not base_model.model.PATH.NAME, NAME one of {names}"
            )
        modules.setdefault(match["path"], {})[match["name"]] = key
    if not modules:
        raise AdapterFormatError("no_effect", "it has no tensors: the adapter changes nothing")
    return modules


def _check_targets(
    method: Method, modules: Mapping[str, Any], parts: Mapping[str, ModuleShape]
) -> None:
    for path in modules:
        if path not in parts:
            raise AdapterFormatError(
                "unknown_module", f"the base model has no module {path!r} to be adapted"
            )
        if not method.targets(path, parts[path]):
            raise AdapterFormatError(
                "unknown_module", f"{path!r} has tensors, but its configuration does not name it"
            )
    for path, shape in parts.items():
        if path not in modules and method.targets(path, shape):
            raise AdapterFormatError(
                "missing_tensor", f"its configuration names {path!r}, but it has no tensors"
            )


def _read_tensors(file: Path, header: _Header) -> dict[str, torch.Tensor]:
    """Return all tensors as float32 copies, out of one view of the file.

    The library checks that the bytes of the tensors are as long as their shapes say, follow each
    other and end with the file. Its own ``get_tensor`` takes twice as long as the copies.
    """
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise AdapterFormatError("bad_tensors", str(error)) from error
    tensors = {}
    with file.open("rb") as stream:
        # Private, so that it may be written to, which torch wants; nobody does.
        data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    for key, entry in header.tensors.items():
        if 0 in entry["shape"]:
            tensors[key] = torch.empty(entry["shape"])
            continue
        dtype, start = _DTYPES[entry["dtype"]], header.n_bytes + entry["data_offsets"][0]
        stored = torch.frombuffer(data, dtype=dtype, count=math.prod(entry["shape"]), offset=start)
        # PEFT serves float32 whatever the file holds; a copy lets go of the mapped file.
        tensors[key] = stored.view(entry["shape"]).to(torch.float32, copy=True)
        if not _is_finite(tensors[key]):
            raise AdapterFormatError("not_finite", f"{key!r} holds NaN or Infinity")
    return tensors


def _is_finite(tensor: torch.Tensor) -> bool:
    # One number that is not finite leaves no finite sum; a sum that is not may only be too large.
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())
