"""The registries of methods and objectives, as the API uses them."""

import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest

from models.domain.base import Parameters
from models.errors import InvalidRequestError
from worker.training import methods, objectives
from worker.training.methods.lora import Lora, LoraParams
from worker.training.objectives.sft import SftParams
from worker.training.plugins import Plugin, Registry


class _Params(Parameters):
    type: str = "one"


class _One(Plugin):
    name: ClassVar[str] = "one"
    Params: ClassVar[type[Parameters]] = _Params


def test_every_file_of_the_packages_is_found() -> None:
    names = {path.stem for path in Path(methods.__path__[0]).glob("[a-z]*.py")}
    assert {"lora", "ia3", "houlsby", "adamix", "meft", "full", "bitfit"} <= set(
        methods.all_methods()
    )
    assert {
        type(each).__module__.rpartition(".")[2] for each in methods.all_methods().values()
    } == (names - {"base"})
    assert {"sft", "text", "dpo", "kto", "orpo", "simpo"} <= set(objectives.all_objectives())
    assert isinstance(methods.get_method("lora"), Lora)
    assert objectives.get_objective("sft").Params is SftParams


def test_a_new_file_is_a_new_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "tunery_test_plugins"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from worker.training.plugins import Registry\nregistry = Registry(__name__, 'x', 'one')\n"
    )
    (package / "extra.py").write_text(
        "from tests.worker.training.test_plugins import _One\n"
        "from tunery_test_plugins import registry\nregistry.add(_One())\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    from tunery_test_plugins import registry  # type: ignore[import-not-found]

    assert list(registry.all()) == ["one"]


def test_a_name_that_is_taken_is_refused() -> None:
    registry: Registry[_One] = Registry("worker.training.methods", "x", "one")
    registry.add(_One())
    with pytest.raises(ValueError, match="'one' is registered twice"):
        registry.add(_One())


def test_importing_both_registries_loads_no_tensor_library() -> None:
    code = (
        "import sys\nfrom worker.training import methods, objectives\n"
        "methods.parse_params({'type': 'lora'}); objectives.parse_params({'type': 'sft'})\n"
        "bad = {'torch', 'peft', 'transformers', 'bitsandbytes', 'sqlalchemy'} & set(sys.modules)\n"
        "print(sorted(bad))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True
    )
    assert ran.stdout.strip() == "[]"


def test_defaults_are_those_of_the_documentation() -> None:
    assert methods.parse_params({"type": "lora"}).model_dump() == {
        "type": "lora",
        "r": 16,
        "alpha": 32.0,
        "dropout": 0.05,
        "target_modules": "all-linear",
        "use_dora": False,
        "use_rslora": False,
        "lora_plus_ratio": 1.0,
        "init": "default",
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    assert methods.parse_params({}) == LoraParams()
    assert objectives.parse_params({}) == SftParams()


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"r": 0}, "peft.r"),
        ({"r": 257}, "peft.r"),
        ({"r": True}, "peft.r"),
        ({"r": 8.0}, "peft.r"),
        ({"r": "8"}, "peft.r"),
        ({"alpha": 0}, "peft.alpha"),
        ({"alpha": True}, "peft.alpha"),
        ({"alpha": float("nan")}, "peft.alpha"),
        ({"alpha": float("inf")}, "peft.alpha"),
        ({"dropout": 1}, "peft.dropout"),
        ({"dropout": -0.1}, "peft.dropout"),
        ({"use_rslora": 1}, "peft.use_rslora"),
        ({"init": "svd"}, "peft.init"),
        ({"rank_pattern": {"q_proj": 4, "layers.0.self_attn.q_proj": 2}}, "peft.rank_pattern"),
        ({"target_modules": "q_proj"}, "peft.target_modules"),
        ({"target_modules": []}, "peft.target_modules"),
        ({"target_modules": [".*"]}, "peft.target_modules"),
        ({"target_modules": ["q_proj", "q_proj"]}, "peft.target_modules"),
        ({"target_modules": [3]}, "peft.target_modules"),
        ({"type": "lorra"}, "peft.type"),
        ({"type": None}, "peft.type"),
        ({"type": ["lora"]}, "peft.type"),
        ({"rank": 8}, "peft.rank"),
    ],
)
def test_bad_parameters_name_the_field(given: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        methods.parse_params({"type": "lora", **given})
    assert caught.value.param == param
    assert param in caught.value.message


def test_an_unknown_type_lists_the_known_ones() -> None:
    with pytest.raises(InvalidRequestError, match=r"Known types: .*sft.*Did you mean 'dpo'"):
        objectives.parse_params({"type": "dpoo"})
    with pytest.raises(InvalidRequestError, match=r"Known types: .*lora"):
        methods.get_method("dora")


def test_an_unknown_field_gets_the_nearest_known_one() -> None:
    with pytest.raises(InvalidRequestError, match=r"Did you mean 'dropout'\?") as caught:
        methods.parse_params({"type": "lora", "drop_out": 0.1})
    assert caught.value.code == "unknown_parameter"


def test_all_faults_are_in_one_message() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        methods.parse_params({"type": "lora", "r": 0, "dropout": 2})
    assert caught.value.param == "peft.r"
    assert "peft.dropout: " in caught.value.message


def test_every_field_of_every_form_is_described() -> None:
    forms: list[type[Parameters]] = [plugin.Params for plugin in methods.all_methods().values()]
    forms += [plugin.Params for plugin in objectives.all_objectives().values()]
    for form in forms:
        for name, field in form.model_fields.items():
            assert name == "type" or field.description, f"{form.__name__}.{name}"
