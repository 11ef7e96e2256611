"""The strict reader of adapter tensors: one test per rule."""

import json
import struct
from collections.abc import Callable, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.worker.inference.tiny import Files, shapes_of, tiny_llama
from worker.inference.engine.adapter_config import read_config
from worker.inference.engine.adapters import StoredAdapter, read_adapter
from worker.inference.engine.errors import AdapterFormatError
from worker.inference.engine.lora import BaseLayers
from worker.inference.engine.params import ModuleShape
from worker.inference.engine.slots import Slots
from worker.inference.engine.weights import BaseLinear

SHAPES = shapes_of(tiny_llama())
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def no_base(path: str) -> BaseLinear:
    """LoRA asks nothing of the base layer."""
    return BaseLinear(torch.empty(0, 0), None)


@pytest.fixture
def files() -> Files:
    return Files(SHAPES)


def read(files: Files, tmp_path: Path) -> StoredAdapter:
    return read_adapter(files.write(tmp_path), "d" * 40, SHAPES)


def refusal(files: Files, tmp_path: Path) -> AdapterFormatError:
    with pytest.raises(AdapterFormatError) as caught:
        read(files, tmp_path)
    return caught.value


def test_a_sound_adapter_is_read_with_every_tensor_in_its_place(
    files: Files, tmp_path: Path
) -> None:
    stored = read(files, tmp_path)
    assert stored.digest == "d" * 40
    assert sorted(stored.modules) == sorted(p for p in SHAPES if p.endswith(("q_proj", "v_proj")))
    path = "model.layers.0.self_attn.q_proj"
    for name in ("lora_A.weight", "lora_B.weight"):
        assert torch.equal(stored.modules[path][name], files.tensors[f"{Q0}.{name}"])
    change = stored.weights(no_base).modules[path]
    assert change.b is not None
    assert torch.equal(change.b, files.tensors[f"{Q0}.lora_B.weight"])
    assert change.scale == 2
    b = change.cast(torch.float32).b
    assert b is not None
    assert torch.equal(b, 2 * files.tensors[f"{Q0}.lora_B.weight"])


METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": "all-linear"},
    "LoRA, scaled": {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["up_proj"]},
    "DoRA": {
        "peft_type": "LORA",
        "r": 3,
        "lora_alpha": 3,
        "use_dora": True,
        "target_modules": ["q_proj", "down_proj"],
    },
    "IA3": {
        "peft_type": "IA3",
        "target_modules": ["k_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
    },
    "bottlenecks and norms": {
        "peft_type": "BOTTLENECK",
        "r": 2,
        "activation": "gelu",
        "target_modules": ["down_proj"],
        "norm_modules": ["model.norm"],
    },
    "MEFT": {
        "peft_type": "MEFT",
        "variant": "meft1",
        "lambda_bits": 7,
        "r": 2,
        "activation": "silu",
        "target_modules": ["model.layers.0", "model.layers.1"],
    },
}


@pytest.mark.parametrize("compiled", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS.keys())
def test_an_adapter_that_is_prepared_keeps_nothing_of_its_file(
    config: dict[str, Any], compiled: torch.dtype | None, tmp_path: Path
) -> None:
    layers = BaseLayers(tiny_llama())
    file = write(config, layers.shapes, tmp_path)
    stored = read_adapter(tmp_path, "d" * 40, layers.shapes)
    slots = Slots(layers.shapes, 1, torch.empty(0), compiled)
    prepared = slots.prepare(stored.weights(layers.read))

    def numbers() -> list[torch.Tensor]:
        changes = prepared.modules.values()
        return [each.clone() for change in changes for each in change.tensors().values()]

    before = numbers()
    with file.open("r+b") as stream:
        stream.write(b"\xff" * file.stat().st_size)
    seen = [each for tensors in stored.modules.values() for each in tensors.values()]
    assert all(each.isnan().all() for each in seen)  # until then there was no copy
    assert before
    assert all(torch.equal(*pair) for pair in zip(before, numbers(), strict=True))
    assert str(file) in mapped()
    del stored, seen
    assert str(file) not in mapped()


def write(config: dict[str, Any], shapes: Mapping[str, ModuleShape], directory: Path) -> Path:
    """Write an adapter of random float32 numbers, and return the file that they are in."""
    (directory / "adapter_config.json").write_text(json.dumps(config))
    method = read_config(directory / "adapter_config.json")
    tensors = {
        f"base_model.model.{path}.{name}": torch.rand(size)
        for path, shape in shapes.items()
        if method.targets(path, shape)
        for name, size in method.shapes(path, shape).items()
    }
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory / "adapter_model.safetensors"


def mapped() -> str:
    """Which files this process has in its memory, among other things."""
    return Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_into_float32_without_change(
    files: Files, tmp_path: Path, dtype: torch.dtype
) -> None:
    files.tensors = {key: tensor.to(dtype) for key, tensor in files.tensors.items()}
    a = read(files, tmp_path).modules["model.layers.0.self_attn.q_proj"]["lora_A.weight"]
    assert a.dtype == torch.float32
    assert torch.equal(a, files.tensors[f"{Q0}.lora_A.weight"].float())


def test_tensors_of_several_dtypes_are_each_read_from_their_place(
    files: Files, tmp_path: Path
) -> None:
    dtypes = cycle((torch.float32, torch.bfloat16, torch.float16))
    for key, dtype in zip(files.tensors, dtypes, strict=False):
        files.tensors[key] = files.tensors[key].to(dtype)
    stored = read(files, tmp_path)
    for path, tensors in stored.modules.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, files.tensors[f"base_model.model.{path}.{name}"].float())
    assert stored.largest == max(float(each.abs().max()) for each in files.tensors.values())


def test_numbers_at_an_odd_place_of_the_file_are_copied_to_an_even_one(
    files: Files, tmp_path: Path
) -> None:
    file = files.write(tmp_path) / "adapter_model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = data[8 : 8 + length], data[8 + length :]
    file.write_bytes(struct.pack("<Q", length + 1) + header + b" " + rest)
    stored = read_adapter(tmp_path, "d" * 40, SHAPES)
    for path, tensors in stored.modules.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, files.tensors[f"base_model.model.{path}.{name}"])
            assert tensor.data_ptr() % 4 == 0


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.lm_head.weight",
        f"{Q0}.lora_magnitude_vector.weight",
        f"{Q0}.lora_A.bias",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        f"{Q0}.lora_A.default.weight",
    ],
)
def test_a_tensor_that_would_not_be_used_is_refused(files: Files, tmp_path: Path, key: str) -> None:
    files.tensors[key] = torch.ones(1)
    error = refusal(files, tmp_path)
    assert error.reason in {"unknown_tensor", "missing_tensor"}
    assert key.split(".lora_")[0].removeprefix("base_model.model.") in error.detail


@pytest.mark.parametrize("side", ["A", "B"])
def test_half_a_pair_is_refused(files: Files, tmp_path: Path, side: str) -> None:
    del files.tensors[f"{Q0}.lora_{side}.weight"]
    error = refusal(files, tmp_path)
    assert error.reason == "missing_tensor"
    assert f"lora_{side}" in error.detail


def test_a_targeted_module_without_tensors_is_refused(files: Files, tmp_path: Path) -> None:
    for side in "AB":
        del files.tensors[f"{Q0}.lora_{side}.weight"]
    error = refusal(files, tmp_path)
    assert error.reason == "missing_tensor"
    assert "layers.0.self_attn.q_proj" in error.detail


def test_tensors_of_a_module_that_is_not_targeted_are_refused(files: Files, tmp_path: Path) -> None:
    files.config["target_modules"] = ["q_proj"]
    error = refusal(files, tmp_path)
    assert error.reason == "unknown_module"
    assert "v_proj" in error.detail


@pytest.mark.parametrize(
    "path", ["language_model.model.layers.0.self_attn.q_proj", "layers.0.self_attn.q_proj"]
)
def test_a_path_that_only_ends_alike_is_refused(files: Files, tmp_path: Path, path: str) -> None:
    for side in "AB":
        files.tensors[f"base_model.model.{path}.lora_{side}.weight"] = files.tensors.pop(
            f"{Q0}.lora_{side}.weight"
        )
    error = refusal(files, tmp_path)
    assert error.reason == "unknown_module"
    assert path in error.detail


@pytest.mark.parametrize(
    ("side", "change"),
    [
        ("A", lambda t: t[:, :-1]),
        ("A", lambda t: t.T),
        ("B", lambda t: t[:-1]),
        ("B", lambda t: t[:, :-1]),
        ("B", lambda t: t[None]),
    ],
)
def test_another_shape_is_refused_with_both_shapes(
    files: Files, tmp_path: Path, side: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    key = f"{Q0}.lora_{side}.weight"
    expected = list(files.tensors[key].shape)
    files.tensors[key] = change(files.tensors[key]).contiguous()
    error = refusal(files, tmp_path)
    assert error.reason == "shape_mismatch"
    assert str(list(files.tensors[key].shape)) in error.detail
    assert str(expected) in error.detail


def test_another_rank_than_the_configuration_says_is_refused(files: Files, tmp_path: Path) -> None:
    files.config["rank_pattern"] = {"layers.0.self_attn.q_proj": 8}
    assert refusal(files, tmp_path).reason == "shape_mismatch"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused(files: Files, tmp_path: Path, value: float) -> None:
    files.tensors[f"{Q0}.lora_A.weight"][0, 0] = value
    error = refusal(files, tmp_path)
    assert error.reason == "not_finite"
    assert Q0 in error.detail


@pytest.mark.parametrize("at", [0, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_number_that_is_not_finite_is_found_in_its_tensor(
    files: Files, tmp_path: Path, dtype: torch.dtype, at: int
) -> None:
    files.tensors = {key: tensor.to(dtype) for key, tensor in files.tensors.items()}
    key = list(files.tensors)[-2]
    files.tensors[key].view(-1)[at] = torch.nan
    error = refusal(files, tmp_path)
    assert error.reason == "not_finite"
    assert error.detail == f"{key!r} holds NaN or Infinity"


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_scale_that_leaves_numbers_no_longer_finite_is_refused(
    files: Files, tmp_path: Path, use_dora: bool
) -> None:
    largest = torch.finfo(torch.float32).max
    files.tensors[f"{Q0}.lora_B.weight"][-1, -1] = largest
    if use_dora:
        files.config["use_dora"] = True
        for path, shape in SHAPES.items():
            if path.endswith(("q_proj", "v_proj")):
                key = f"base_model.model.{path}.lora_magnitude_vector"
                files.tensors[key] = torch.ones(shape.out_features)
    with pytest.raises(AdapterFormatError) as caught:
        read(files, tmp_path).weights(BaseLayers(tiny_llama()).read)
    assert caught.value.reason == "not_finite"
    assert caught.value.detail == "the b of 'model.layers.0.self_attn.q_proj' is not finite"


def test_a_scale_that_leaves_the_largest_number_finite_is_served(
    files: Files, tmp_path: Path
) -> None:
    # Only A holds it, which is not scaled.
    largest = torch.finfo(torch.float32).max
    files.tensors[f"{Q0}.lora_A.weight"][0, 0] = largest
    assert read(files, tmp_path).weights(no_base)
    files.tensors[f"{Q0}.lora_B.weight"][0, 0] = largest
    files.config["lora_alpha"] = 4
    assert read(files, tmp_path).weights(no_base)


def test_large_numbers_are_not_taken_for_infinite_ones(files: Files, tmp_path: Path) -> None:
    tensor = files.tensors[f"{Q0}.lora_A.weight"]
    tensor[0] = torch.finfo(torch.float32).max  # the sum of a row is beyond it
    assert not torch.isfinite(tensor.sum())
    kept = read(files, tmp_path).modules["model.layers.0.self_attn.q_proj"]["lora_A.weight"]
    assert torch.equal(kept, tensor)


def test_an_adapter_without_tensors_is_refused(files: Files, tmp_path: Path) -> None:
    files.tensors.clear()
    assert refusal(files, tmp_path).reason == "no_effect"


def test_an_adapter_whose_b_is_all_zero_is_served_with_a_warning(
    files: Files, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for key, tensor in files.tensors.items():
        if "lora_B" in key:
            tensor.zero_()
    assert len(read(files, tmp_path).weights(no_base).modules) == 4
    assert "changes nothing" in caplog.text


def test_integers_are_refused(files: Files, tmp_path: Path) -> None:
    files.tensors[f"{Q0}.lora_A.weight"] = torch.ones(4, 64, dtype=torch.int8)
    assert refusal(files, tmp_path).reason == "bad_dtype"


def test_too_many_tensors_are_refused_by_the_header(files: Files, tmp_path: Path) -> None:
    directory = files.write(tmp_path)
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    write_raw(directory, json.dumps({f"t{i}": entry for i in range(10_001)}).encode())
    with pytest.raises(AdapterFormatError, match="10001 tensors"):
        read_adapter(directory, "d" * 40, SHAPES)


def write_raw(directory: Path, header: bytes, length: int | None = None) -> None:
    prefix = struct.pack("<Q", len(header) if length is None else length)
    (directory / "adapter_model.safetensors").write_bytes(prefix + header)


@pytest.mark.parametrize(
    ("header", "length"),
    [
        (b"", 2**60),
        (b"{}", 2**20 + 1),
        (b"", 0),
        (b"not json", None),
        (b'{"a": 1, "a": 2}', None),
        (b'{"a": 1}', None),
        (b'{"a": {"dtype": "F32"}}', None),
        (b"[]", None),
        (b"\xff\xff", None),
    ],
)
def test_a_damaged_header_is_refused(
    files: Files, tmp_path: Path, header: bytes, length: int | None
) -> None:
    directory = files.write(tmp_path)
    write_raw(directory, header, length)
    with pytest.raises(AdapterFormatError) as caught:
        read_adapter(directory, "d" * 40, SHAPES)
    assert caught.value.reason == "bad_tensors"


def test_a_truncated_file_is_refused(files: Files, tmp_path: Path) -> None:
    file = files.write(tmp_path) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(AdapterFormatError) as caught:
        read_adapter(tmp_path, "d" * 40, SHAPES)
    assert caught.value.reason == "bad_tensors"


def test_pickled_weights_are_not_looked_at(files: Files, tmp_path: Path) -> None:
    directory = files.write(tmp_path)
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")
    with pytest.raises(AdapterFormatError, match="pickled") as caught:
        read_adapter(directory, "d" * 40, SHAPES)
    assert caught.value.reason == "missing_file"
