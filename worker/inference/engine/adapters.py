"""A strict reader of PEFT adapter directories: every tensor is used exactly once, or none is."""

import json
import logging
import math
import mmap
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby
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
_SURELY_FINITE = torch.finfo(torch.float32).max / 2
"""A product of up to this is finite in float32, however its factors were rounded."""
_ALONE = 16_384
"""Numbers that PyTorch copies on one thread: others of its are busy with passes, or asleep."""
_KEY = re.compile(
    r"base_model\.model\.(?P<path>[A-Za-z0-9_.]+?)\.(?P<name>(?:lora|ia3|own|meft)_[A-Za-z0-9_.]+)"
)


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """A checked adapter as its files hold it: float32 tensors by module path and name."""

    digest: str
    method: Method
    modules: Mapping[str, Mapping[str, torch.Tensor]]
    """Views of the mapped file where it holds float32, so not to be kept: `cast` copies them."""
    largest: float
    """The largest magnitude of all their numbers."""

    @torch.no_grad()
    def weights(self, base: Callable[[str], BaseLinear]) -> AdapterWeights:
        """Return what it does to the layers of the base model, whose weights `base` gives by path.

        Raises:
            AdapterFormatError: a gain that follows from both is not finite.
        """
        modules = {
            path: self.method.change(path, tensors, base) for path, tensors in self.modules.items()
        }
        # Those that were stored are known to be finite.
        stored = {id(tensor) for tensors in self.modules.values() for tensor in tensors.values()}
        for path, change in modules.items():
            for name, tensor in change.tensors().items():
                if id(tensor) not in stored and not _is_finite(tensor):
                    raise AdapterFormatError("not_finite", f"the {name} of {path!r} is not finite")
            may_overflow = change.scale * self.largest > _SURELY_FINITE
            if may_overflow and change.b is not None and not _is_finite(change.b * change.scale):
                raise AdapterFormatError("not_finite", f"the b of {path!r} is not finite")
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
    tensors, largest = _read_tensors(file, header)
    return StoredAdapter(
        digest,
        method,
        {
            path: {name: tensors[key] for name, key in keys.items()}
            for path, keys in modules.items()
        },
        largest,
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


def _read_tensors(file: Path, header: _Header) -> tuple[dict[str, torch.Tensor], float]:
    """Return all tensors in float32, and the largest magnitude of their numbers.

    They are views of the file where it holds float32: were it cut short before they are read, the
    process would end. The library checks that the bytes of the tensors are as long as their shapes
    say, follow each other and end with the file, so that neighbours of one dtype are converted and
    looked at together, in a few calls.
    """
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise AdapterFormatError("bad_tensors", str(error)) from error
    with file.open("rb") as stream:
        # Private, so that it may be written to, which torch wants; nobody does.
        data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    tensors, largest = {}, 0.0
    entries = sorted(header.tensors.items(), key=lambda each: each[1]["data_offsets"])
    for name, run in groupby(entries, key=lambda each: each[1]["dtype"]):
        shapes = {key: entry["shape"] for key, entry in run}
        sizes = [math.prod(shape) for shape in shapes.values()]
        start = header.n_bytes + header.tensors[next(iter(shapes))]["data_offsets"][0]
        numbers = _numbers(data, start, sum(sizes), _DTYPES[name])
        for (key, shape), piece in zip(shapes.items(), numbers.split(sizes), strict=True):
            tensors[key] = piece.view(shape)
        magnitude = _largest(numbers)
        if not math.isfinite(magnitude):
            key = next(key for key in shapes if not _is_finite(tensors[key]))
            raise AdapterFormatError("not_finite", f"{key!r} holds NaN or Infinity")
        largest = max(largest, magnitude)
    return tensors, largest


def _numbers(data: mmap.mmap, start: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Return `count` numbers from byte `start` on as float32, which PEFT serves in any case."""
    if not count:
        return torch.empty(0)
    stored = torch.frombuffer(data, dtype=dtype, count=count, offset=start)
    if dtype == torch.float32 and start % dtype.itemsize == 0:  # loops read whole words
        return stored
    numbers = torch.empty(count)
    for own, piece in zip(numbers.split(_ALONE), stored.split(_ALONE), strict=True):
        own.copy_(piece)
    return numbers


def _largest(numbers: torch.Tensor) -> float:
    """Return the largest magnitude; NaN or infinity where there is one.

    NumPy looks at them on this thread alone, and takes no longer.
    """
    array = numbers.numpy()
    return float(max(-array.min(), array.max())) if array.size else 0.0  # both NaN with one NaN


def _is_finite(tensor: torch.Tensor) -> bool:
    return math.isfinite(_largest(tensor))
