"""The methods against numbers that their papers print, and what those papers promise of them.

``methods.md`` of the specification has them by section; each test names its own.
"""

from statistics import NormalDist
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from models.domain.estimates import BaseShape, LayerShape
from tests.worker.training.tiny import attach, lora, tiny_llama
from worker.training import methods
from worker.training.model import trainable_parameters

IDS = torch.arange(3, 15)[None]

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def shape_of(
    n_blocks: int, width: int, n_norms: int = 0, **layers: tuple[int, int, int]
) -> BaseShape:
    """A base of `layers`: outputs, inputs, count."""
    return BaseShape(
        layers={
            name: LayerShape(outputs=outputs, inputs=inputs, count=count)
            for name, (outputs, inputs, count) in layers.items()
        },
        n_other=0,
        n_blocks=n_blocks,
        width=width,
        n_norms=n_norms,
    )


def count(shape: BaseShape, **peft: Any) -> int:
    return methods.get_method(peft["type"]).count_parameters(shape, methods.parse_params(peft))


@pytest.mark.parametrize(("r", "n_parameters"), [(1, 4_718_592), (8, 37_748_736)])
def test_lora_on_gpt3_has_the_parameters_of_the_paper(r: int, n_parameters: int) -> None:
    """Table 4 of arXiv 2106.09685: 4.7M and 37.7M on queries and values (section 1.1)."""
    gpt3 = shape_of(96, 12288, q=(12288, 12288, 96), v=(12288, 12288, 96))
    assert count(gpt3, type="lora", r=r, target_modules=["q", "v"]) == n_parameters


def test_ia3_on_t0_3b_has_the_parameters_of_the_paper() -> None:
    """Arrangement of T5-XL: 24 blocks each; decoder blocks have two attentions (section 3.1)."""
    attention, feed_forward = (2048, 2048, 72), (2048, 5120, 48)
    t0 = shape_of(48, 2048, q=attention, k=attention, v=attention, o=attention, wo=feed_forward)
    assert count(t0, type="ia3") == 540_672


@pytest.mark.parametrize(
    ("n_blocks", "width", "m", "deployed"),
    [(12, 768, 48, 894_528), (24, 1024, 16, 811_392), (24, 1024, 8, 417_984)],
    ids=["BERT-base", "RoBERTa-large", "GPT-2 M"],
)
def test_a_merged_adamix_has_the_parameters_of_the_paper(
    n_blocks: int, width: int, m: int, deployed: int
) -> None:
    """Tables 1 to 3 of arXiv 2205.12410: 0.9M, 0.8M, 0.42M (section 4.4)."""
    shape = shape_of(n_blocks, width)
    assert count(shape, type="houlsby", placement="pfeiffer", r=m) == deployed
    assert count(shape, type="adamix", experts=1, r=m) == deployed


def test_a_training_adamix_on_bert_base_has_four_experts_under_one_up_projection() -> None:
    assert count(shape_of(12, 768), type="adamix", experts=4, r=48) == 2_223_360


def test_houlsby_on_bert_base_has_two_bottlenecks_a_block_and_its_norms() -> None:
    """Section 5.1: 2L(2dm + m + d) and the norms' 4Ld."""
    norms = 4 * 12 * 768
    assert norms == 36_864
    shape = shape_of(12, 768, n_norms=norms)
    assert count(shape, type="houlsby", r=64) == 2_379_264 + norms


def test_the_levels_of_nf4_are_the_quantiles_of_a_normal_distribution() -> None:
    """Section 2.1: 16 levels with an exact 0; the code book of arXiv 2305.14314, appendix E."""
    offset = ((1 - 1 / 30) + (1 - 1 / 32)) / 2
    assert offset == pytest.approx(0.9677083, abs=1e-7)
    quantile = NormalDist().inv_cdf

    def spread(n: int) -> list[float]:
        return [quantile(offset + (0.5 - offset) * at / (n - 1)) for at in range(n - 1)]

    levels = torch.tensor([*(-each for each in spread(8)), 0.0, *spread(9)]).sort().values
    levels /= levels.max()
    _, state = bnb.functional.quantize_4bit(torch.ones(1, 64), quant_type="nf4")
    assert float((levels - state.code).abs().max()) <= 2e-7
    assert float(levels[1]) == pytest.approx(-0.6961928, abs=1e-6)


@pytest.mark.parametrize(("kind", "expected"), [("nf4", 0.092), ("fp4", 0.122)])
def test_nf4_loses_less_of_normal_weights_than_fp4(kind: str, expected: float) -> None:
    """Relative errors of section 2.5; double quantisation adds next to nothing."""
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    for nested in (False, True):
        packed, state = bnb.functional.quantize_4bit(
            weight, quant_type=kind, compress_statistics=nested
        )
        found = bnb.functional.dequantize_4bit(packed, state)
        assert float((found - weight).norm() / weight.norm()) == pytest.approx(expected, abs=2e-3)
        # Section 2.1, no. 3: 4 + 8/64 + 32/(64·256) bits with, 4 + 32/64 without.
        n_bits = 8 * (packed.numel() + state.absmax.numel() * state.absmax.element_size())
        n_bits += 32 * state.state2.absmax.numel() if nested else 0
        assert n_bits / weight.numel() == pytest.approx(4.127 if nested else 4.5, abs=1e-3)


def learned(**changes: Any) -> Any:
    """A LoRA on the tiny Llama with weights as if it had learned."""
    model = attach(tiny_llama(), lora(**changes)).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in trainable_parameters(model).values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"init": "pissa"}], ids=str)
def test_a_merged_lora_computes_the_same_in_the_modules_of_the_base(
    changes: dict[str, Any],
) -> None:
    """No latency is added (section 1.3, nos. 2 and 8): no module and no operation is left over."""
    model = learned(r=4, **changes)
    with torch.no_grad():
        expected = model(IDS).logits
        merged = model.merge_and_unload()
        found = merged(IDS).logits
    assert float((found - expected).norm() / expected.norm()) <= 2e-6
    base = {path: type(module) for path, module in tiny_llama().named_modules()}
    assert {path: type(module) for path, module in merged.named_modules()} == base
    assert {type(merged.get_submodule(path)) for path in base if path.endswith("_proj")} == {
        nn.Linear
    }
    sizes = {name: tensor.shape for name, tensor in tiny_llama().state_dict().items()}
    assert {name: tensor.shape for name, tensor in merged.state_dict().items()} == sizes


def test_what_lora_adds_has_its_rank() -> None:
    """Section 1.3, no. 4."""
    model = learned(r=3)
    layer = model.get_base_model().get_submodule("model.layers.0.mlp.up_proj")
    values = torch.linalg.svdvals(layer.get_delta_weight("default").detach())
    assert float(values[3] / values[0]) < 1e-6 < float(values[2] / values[0])


def test_one_expert_without_dropout_has_nothing_to_be_consistent_with() -> None:
    """Section 4.7, no. 4: the consistency term is 0 with one expert, more with several."""
    from worker.training.tuners.experts import divergence

    for experts, is_consistent in ((1, True), (4, False)):
        model: Any = attach(tiny_llama(), {"type": "adamix", "r": 8, "experts": experts}).train()
        for parameter in trainable_parameters(model).values():
            parameter.data *= 20
        with torch.no_grad():
            passes = [model(IDS).logits[0] for _ in range(4)]
        terms = [float(divergence(passes[0], other)) for other in passes[1:]]
        assert (max(terms) == pytest.approx(0, abs=1e-6)) is is_consistent


def test_full_fine_tuning_moves_every_parameter() -> None:
    """Section 7: nothing of the base is left out of an update."""
    model: Any = attach(tiny_llama(), {"type": "full"}).train()
    before = {n: p.detach().clone() for n, p in trainable_parameters(model).items()}
    everything = torch.arange(model.config.vocab_size)[None]
    model(input_ids=everything, labels=everything).loss.backward()
    torch.optim.SGD(trainable_parameters(model).values(), lr=1.0).step()
    assert all((p != before[n]).any() for n, p in trainable_parameters(model).items())
