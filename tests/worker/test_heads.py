"""What a base model is loaded with, and what of it is new and so trained and stored."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from tests.worker.training.encoders import ENCODERS, SEQ2SEQ, save_encoder
from worker.base_models import compute_dtype, load_model
from worker.base_shape import read_shape
from worker.heads import Head, family_of, head_paths, head_settings


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"bert": save_encoder(tmp_path_factory.mktemp("bert"), "bert")}


def test_only_what_the_files_lack_is_a_new_head(bases: dict[str, Path], tmp_path: Path) -> None:
    model = load_model(bases["bert"], precision="bf16", head=Head("masked_lm"))
    transform = "cls.predictions.transform"
    assert head_paths(model) == [f"{transform}.dense", f"{transform}.LayerNorm"]
    new = {n for n, p in model.named_parameters() if p.requires_grad}
    assert new == {f"{path}.{kind}" for path in head_paths(model) for kind in ("weight", "bias")}
    assert model.get_submodule(f"{transform}.dense").weight.dtype == torch.float32
    assert model.get_input_embeddings().weight.dtype == compute_dtype("cpu")
    model.float().save_pretrained(tmp_path)
    assert head_paths(load_model(tmp_path, precision="fp32", head=Head("masked_lm"))) == []
    classifier = load_model(tmp_path, precision="fp32", head=Head("sequence_classification", 2))
    assert head_paths(classifier) == ["bert.pooler.dense", "classifier"]


@pytest.mark.parametrize(
    ("model_type", "family"),
    [
        *((name, "encoder") for name in ENCODERS),
        *((name, "encoder_decoder") for name in SEQ2SEQ),
        *((name, "decoder") for name in ("gemma", "gpt2", "gpt_neox", "llama", "phi", "qwen2")),
    ],
)
def test_what_a_model_is_follows_from_its_configuration(model_type: str, family: str) -> None:
    assert family_of(AutoConfig.for_model(model_type)) == family


def test_the_shape_of_a_base_tells_its_family(bases: dict[str, Path]) -> None:
    assert read_shape(bases["bert"]).family == "encoder"


def test_a_new_head_follows_from_its_seed_and_nothing_else(bases: dict[str, Path]) -> None:
    def weight(seed: int) -> torch.Tensor:
        head = Head("sequence_classification", 3, seed)
        found: torch.Tensor = load_model(bases["bert"], precision="fp32", head=head).get_parameter(
            "classifier.weight"
        )
        return found

    torch.manual_seed(1)
    first = weight(5)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(first, weight(5))
    assert torch.equal(after, torch.rand(1))
    assert not torch.equal(first, weight(6))


@pytest.mark.parametrize(
    ("targets", "settings"),
    [
        (["query"], {"target_modules": ["query"]}),
        (
            ["dense", "query"],
            {"target_modules": ["dense", "query"], "exclude_modules": ["p.dense"]},
        ),
        (["x.query", "head"], {"target_modules": ["x.query"]}),
        (r".*\.query", {}),
        (r".*dense", {"exclude_modules": ["p.dense"]}),
        (None, {}),
    ],
)
def test_a_new_head_is_stored_and_kept_from_being_adapted(
    targets: object, settings: dict[str, list[str]]
) -> None:
    heads = ["head", "p.dense"]
    assert head_settings(heads, targets) == {"modules_to_save": heads, **settings}
