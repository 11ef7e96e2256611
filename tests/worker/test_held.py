"""What a loaded base holds: nothing of its file where its layers have other weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from worker.base_models import BaseModelInfo, load_model
from worker.held import compute_in_float32_, leave_files_


def mapped(directory: Path) -> list[str]:
    """The maps of this process that are files of `directory`."""
    return [
        line for line in Path("/proc/self/maps").read_text().splitlines() if str(directory) in line
    ]


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_a_quantised_base_lets_go_of_its_file(
    precision: str, smollm2: tuple[Path, BaseModelInfo]
) -> None:
    directory, _ = smollm2
    before = mapped(directory)
    model = load_model(directory, precision=precision)
    assert mapped(directory) == before
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_shared_weights_stay_shared_and_only_numbers_with_a_point_are_copied() -> None:
    model: Any = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    model.register_buffer("places", torch.arange(3))
    places, weight = model.places.data_ptr(), model[0].weight.data_ptr()
    assert leave_files_(model) == 9 * 4
    assert model[1].weight is model[0].weight
    assert (model.places.data_ptr() == places, model[0].weight.data_ptr() == weight) == (
        True,
        False,
    )


def test_float32_where_bfloat16_was() -> None:
    model = nn.Linear(3, 3, dtype=torch.bfloat16)
    compute_in_float32_(model)
    assert model.weight.dtype == model.bias.dtype == torch.float32
