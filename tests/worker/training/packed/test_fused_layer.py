"""Layers that are taken over compute what they did, forward and backward; others stay."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from models.domain.training import Precision
from tests.worker.training.tiny import SIZES, attach, lora
from worker.training import recompute
from worker.training.forward import PackedForward, PaddedForward, choose_forward
from worker.training.model import trainable_parameters
from worker.training.objectives.base import IGNORED, Batch
from worker.training.packed import layout
from worker.training.packed.fused_layer import FusedLayer, fuse
from worker.training.packed.layout import Layout
from worker.training.packed.rewire import TOLERANCE, undo
from worker.transformer_blocks import UnknownLayersError

LENGTHS = [9, 8, 3, 1]


def model_of(family: str, peft: dict[str, Any] | None = None, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **changes})
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in base.named_parameters():
        if "norm" in name or name.endswith("bias"):
            nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
    model = attach(base.eval().requires_grad_(False), lora(**(peft or {})))
    for parameter in trainable_parameters(model, "default").values():
        nn.init.normal_(parameter, 0.0, 0.3)
    return model.eval()


def packed(model: Any, device: str = "cpu") -> PackedForward:
    forward, reason = choose_forward(model, precision(), device, 0, cache_weights=False)
    assert reason is None
    assert isinstance(forward, PackedForward)
    return forward


def to_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast what is frozen."""
    for each in model.parameters():
        if not each.requires_grad:
            each.data = each.data.to(dtype)


def precision() -> Precision:
    return Precision(type="fp32")


def n_fused(model: nn.Module) -> int:
    return sum(isinstance(each.__dict__.get("forward"), FusedLayer) for each in model.modules())


def batch(device: str = "cpu") -> Batch:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 97, (sum(LENGTHS),), generator=draw)
    targets = torch.randint(3, 97, (sum(LENGTHS),), generator=draw)
    targets[::3] = IGNORED
    return Batch(ids.to(device), targets.to(device), LENGTHS)


def gradients(model: Any, forward: Any) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = forward.cross_entropy(batch(str(model.device))).loss
    loss.backward()
    found = {}
    for name, parameter in trainable_parameters(model, "default").items():
        assert parameter.grad is not None
        found[name] = parameter.grad.cpu().clone()
    return float(loss.detach()), found


def assert_same(model: Any, forward: Any, expected: Any) -> None:
    loss, found = gradients(model, forward)
    assert loss == pytest.approx(expected[0], rel=1e-5)
    for name, gradient in expected[1].items():
        error = (found[name] - gradient).norm() / gradient.norm()
        assert float(error) < 1e-3, name


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"head_dim": 12}),
        ("mistral", {"head_dim": 8, "sliding_window": None}),
        ("qwen2", {}),
    ],
    ids=str,
)
def test_loss_and_gradients_are_those_of_the_layers_themselves(
    family: str, changes: dict[str, Any]
) -> None:
    model = model_of(family, **changes)
    forward = packed(model)
    assert n_fused(model) == 2
    assert_same(model, forward, gradients(model, PaddedForward(model, precision(), "cpu", 0)))


@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"], ["down_proj"]]
)
def test_a_layer_whose_products_have_not_all_an_adapter_is_one_node(targets: list[str]) -> None:
    model = model_of("llama", {"target_modules": targets})
    forward = packed(model)
    assert n_fused(model) == 2
    assert_same(model, forward, gradients(model, PaddedForward(model, precision(), "cpu", 0)))


def test_without_its_adapter_a_layer_is_its_base() -> None:
    model = model_of("llama")
    forward = packed(model)
    padded = PaddedForward(model, precision(), "cpu", 0)
    with torch.no_grad(), forward.without_adapter():
        found = forward.log_probs(batch())
    with torch.no_grad(), padded.without_adapter():
        expected = padded.log_probs(batch())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_layer_that_runs_again_in_the_backward_pass_gives_the_same_to_the_bit() -> None:
    model = model_of("llama", {"dropout": 0.3}).train()
    forward = packed(model)
    torch.manual_seed(5)
    loss, expected = gradients(model, forward)
    recompute.enable(model)
    torch.manual_seed(5)
    again, found = gradients(model, forward)
    assert n_fused(model) == 2
    assert again == loss
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_dropout_draws_what_it_draws_in_modules_of_their_own() -> None:
    model = model_of("llama", {"dropout": 0.3}).train()
    forward = packed(model)
    torch.manual_seed(5)
    expected = gradients(model, forward)
    for layer in model.modules():
        if isinstance(layer.__dict__.get("forward"), FusedLayer):
            del layer.forward
    assert n_fused(model) == 0
    torch.manual_seed(5)
    assert_same(model, forward, expected)


def test_rows_longer_than_a_window_go_through_the_layer_itself() -> None:
    model = model_of("mistral", head_dim=8, sliding_window=4)
    forward = packed(model)
    assert n_fused(model) == 2
    assert_same(model, forward, gradients(model, PaddedForward(model, precision(), "cpu", 0)))


@pytest.mark.parametrize(
    ("family", "changes", "peft"),
    [
        ("qwen3", {"head_dim": 8}, {}),
        ("llama", {"attention_dropout": 0.1}, {}),
        ("llama", {"hidden_act": "gelu"}, {}),
        ("llama", {}, {"target_modules": ["q_proj"], "use_dora": True}),
        ("olmo2", {}, {}),
    ],
    ids=[
        "norms of heads",
        "dropout of attention",
        "another gate",
        "another adapter",
        "other norms",
    ],
)
def test_layers_of_another_kind_stay(
    family: str, changes: dict[str, Any], peft: dict[str, Any]
) -> None:
    model = model_of(family, peft, **changes)
    forward = packed(model)
    assert n_fused(model) == 0
    assert_same(model, forward, gradients(model, PaddedForward(model, precision(), "cpu", 0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_with_other_numbers_than_it_seems_to_have_is_left_alone(
    dtype: torch.dtype,
) -> None:
    model = model_of("llama")
    to_dtype(model, dtype)
    packed(model)
    layer = model.get_base_model().model.layers[0]
    fused = layer.forward
    assert isinstance(fused, FusedLayer)
    places = {
        layer.get_submodule(name): (group, index)
        for group, names in zip(
            fused.groups,
            (["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]),
            strict=True,
        )
        for index, name in enumerate(
            f"{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}" for name in names
        )
    }
    del layer.forward
    assert isinstance(fuse(layer, places, "default", TOLERANCE), FusedLayer)
    layer.input_layernorm.variance_epsilon = 3.0
    layer.input_layernorm.forward = lambda x: x
    with pytest.raises(UnknownLayersError, match="tried on numbers"):
        fuse(layer, places, "default", TOLERANCE)


def test_a_layer_that_makes_much_of_roundings_may_differ_by_what_they_make() -> None:
    model = model_of("llama", hidden_size=128, intermediate_size=256, head_dim=32)
    to_dtype(model, torch.bfloat16)
    packed(model)
    assert n_fused(model) == 2


def test_outside_of_packed_passes_and_when_undone_a_layer_is_its_own() -> None:
    model = model_of("llama")
    packed(model)
    layer = model.get_base_model().model.layers[0]
    fused = layer.forward
    calls: list[int] = []
    ids = torch.arange(5)[None]
    fused.run = lambda *_: calls.append(1)
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    assert calls == []
    with layout.active(Layout.of([5], "default")), pytest.raises(AttributeError):
        model(input_ids=ids, position_ids=ids, use_cache=False)
    assert calls == [1]
    undo(model)
    assert n_fused(model) == 0


def error_of(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """Return how far gradients are from the exact ones, as a share of all these together."""
    squares = sum(float((found[name] - each).square().sum()) for name, each in exact.items())
    return (squares / sum(float(each.square().sum()) for each in exact.values())) ** 0.5


@pytest.mark.gpu
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize(
    ("family", "changes", "peft"),
    [
        ("llama", {}, {}),
        ("llama", {"head_dim": 64, "num_key_value_heads": 4}, {"target_modules": ["q_proj"]}),
        ("mistral", {"head_dim": 16, "sliding_window": None}, {"r": 3}),
        ("qwen2", {}, {}),
    ],
    ids=str,
)
def test_on_a_gpu_a_layer_is_one_node_and_as_near_to_the_exact_gradients_as_peft_is(
    family: str, changes: dict[str, Any], peft: dict[str, Any], again: bool
) -> None:
    exact_model = model_of(family, peft, **changes)
    for each in trainable_parameters(exact_model, "default").values():
        each.data *= 0.2
    to_dtype(exact_model, torch.bfloat16)
    to_dtype(exact_model, torch.float32)
    exact_loss, exact = gradients(exact_model, PaddedForward(exact_model, precision(), "cpu", 0))
    model = exact_model.cuda()
    to_dtype(model, torch.bfloat16)
    padded = PaddedForward(model, Precision(type="bf16"), "cuda:0", 0)
    peft_loss, peft_found = gradients(model, padded)
    forward = packed(model, "cuda:0")
    assert n_fused(model) == 2
    if again:
        recompute.enable(model.train())
    loss, found = gradients(model, forward)
    assert abs(loss - exact_loss) < 2 * abs(peft_loss - exact_loss) + 1e-2
    assert error_of(found, exact) < 1.5 * error_of(peft_found, exact)
