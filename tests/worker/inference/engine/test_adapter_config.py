"""What the strict reader accepts and refuses in ``adapter_config.json``."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig as PeftLoraConfig

from worker.inference.engine.adapter_config import read_config
from worker.inference.engine.errors import AdapterFormatError
from worker.inference.engine.methods.lora import LoraConfig
from worker.inference.engine.params import ModuleShape

MINIMAL = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}


def read(tmp_path: Path, **changes: Any) -> LoraConfig:
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**MINIMAL, **changes}))
    config = read_config(path)
    assert isinstance(config, LoraConfig)
    return config


def test_everything_that_peft_writes_by_default_is_accepted(tmp_path: Path) -> None:
    PeftLoraConfig(r=4, target_modules=["k_proj"], task_type="CAUSAL_LM").save_pretrained(
        str(tmp_path)
    )
    config = read_config(tmp_path / "adapter_config.json")
    assert isinstance(config, LoraConfig)
    assert (config.r, config.alpha, config.target_modules) == (4, 8.0, ("k_proj",))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("modules_to_save", ["lm_head"]),
        ("bias", "all"),
        ("lora_bias", True),
        ("layer_replication", [[0, 1]]),
        ("layers_to_transform", [0]),
        ("layers_pattern", "layers"),
        ("exclude_modules", ["lm_head"]),
        ("target_parameters", ["experts.w"]),
        ("trainable_token_indices", [1]),
        ("alora_invocation_tokens", [1]),
        ("use_qalora", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "loftq"),
        ("a_key_of_the_future", 1),
        ("target_modules", r".*\.q_proj"),
        ("rank_pattern", {"(a+)+": 4}),
    ],
)
def test_a_feature_that_is_not_served_is_refused_by_name(
    tmp_path: Path, key: str, value: Any
) -> None:
    with pytest.raises(AdapterFormatError, match=key) as caught:
        read(tmp_path, **{key: value})
    assert caught.value.reason == "unsupported_feature"


@pytest.mark.parametrize("off", [None, False, {}, []])
def test_an_unknown_feature_that_is_switched_off_is_accepted(tmp_path: Path, off: Any) -> None:
    assert read(tmp_path, a_key_of_the_future=off).r == 8


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 0),
        ("r", True),
        ("r", "8"),
        ("r", None),
        ("lora_alpha", 0),
        ("lora_alpha", "16"),
        ("use_rslora", 1),
        ("rank_pattern", [1]),
        ("rank_pattern", {"q_proj": 1.5}),
        ("alpha_pattern", {"q_proj": None}),
        ("target_modules", []),
        ("target_modules", None),
        ("target_modules", [1]),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_name(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(AdapterFormatError, match=key) as caught:
        read(tmp_path, **{key: value})
    assert caught.value.reason == "bad_config"


@pytest.mark.parametrize("text", ["", "[]", "{", '{"r": NaN}', '{"r": Infinity}', "[" * 100_000])
def test_what_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text(text)
    with pytest.raises(AdapterFormatError) as caught:
        read_config(path)
    assert caught.value.reason == "bad_config"


def test_a_huge_configuration_is_refused_unread(tmp_path: Path) -> None:
    with pytest.raises(AdapterFormatError, match="1 MiB"):
        read(tmp_path, revision="x" * 2**20)


def test_a_missing_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterFormatError) as caught:
        read_config(tmp_path / "adapter_config.json")
    assert caught.value.reason == "missing_file"


def test_another_peft_method_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterFormatError) as caught:
        read(tmp_path, peft_type="VERA")
    assert caught.value.reason == "unsupported_method"


def test_scale_is_alpha_over_rank_or_over_its_root(tmp_path: Path) -> None:
    assert read(tmp_path).scale("m.q_proj") == 2
    assert read(tmp_path, use_rslora=True).scale("m.q_proj") == 16 / math.sqrt(8)


def test_the_first_pattern_that_matches_the_end_of_the_path_decides(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        rank_pattern={"layers.0.q_proj": 2, "q_proj": 4, "^model.v_proj": 1},
        alpha_pattern={"q_proj": 8},
    )
    assert config.rank("model.layers.0.q_proj") == 2
    assert config.rank("model.layers.1.q_proj") == 4
    assert config.rank("model.layers.0.xq_proj") == 8
    assert config.rank("model.v_proj") == 1
    assert config.rank("other.model.v_proj") == 8
    assert config.scale("model.layers.0.q_proj") == 4


def test_target_names_match_whole_components_and_all_linear_all_but_the_head(
    tmp_path: Path,
) -> None:
    inner, head = ModuleShape(1, 1), ModuleShape(1, 1, is_output=True)
    named = read(tmp_path, target_modules=["q_proj", "lm_head"])
    assert named.targets("a.q_proj", inner)
    assert named.targets("lm_head", head)
    assert not named.targets("a.xq_proj", inner)
    every = read(tmp_path, target_modules="all-linear")
    assert every.targets("a.anything", inner)
    assert not every.targets("lm_head", head)
