"""The kernels as operators on tensors of a GPU, in bfloat16, float16 or float32."""

from typing import Any

import torch
import triton

from worker.gpu import kernels

_Pair = tuple[torch.Tensor, torch.Tensor]
GATE_BLOCK = 1024
LOGITS_BLOCK = 8192


def try_out(device: str) -> None:
    """Compile and run a small kernel on `device`.

    Raises:
        Whatever Triton raises where it, a C compiler or Python's headers are missing.
    """
    x = torch.ones(2, 16, device=device)
    found = gated(x, x, out=torch.empty_like(x))
    expected = torch.nn.functional.silu(x)
    if not torch.allclose(found, expected, atol=1e-5):
        raise RuntimeError(f"a kernel gives {found[0, 0]} instead of {expected[0, 0]}")


def rescale(
    x: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    *,
    out: torch.Tensor,
    factors: torch.Tensor,
) -> torch.Tensor:
    """Return RMSNorm of contiguous x [..., d] (arXiv 1910.07467, eq. 4), as Llama rounds it.

    Args:
        x: What is scaled.
        weight: [d].
        epsilon: ε.
        out: Contiguous, as x; is filled and returned.
        factors: float32, one for each token: is filled with what each was multiplied with.
    """
    d = x.shape[-1]
    told = (out, x, x, x, weight, factors, d, epsilon)
    _launch(kernels.rescale, (x.numel() // d,), told, adds=False, **_row(d))
    return out


def add_and_rescale(
    x: torch.Tensor,
    z: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    *,
    out: _Pair,
    factors: torch.Tensor,
) -> _Pair:
    """Return x + z, contiguous [..., d], and `rescale` of the sum; `out` is a place for each."""
    total, y = out
    d = x.shape[-1]
    told = (y, total, x, z, weight, factors, d, epsilon)
    _launch(kernels.rescale, (x.numel() // d,), told, adds=True, **_row(d))
    return out


def rescale_back(  # noqa: PLR0913 - what `rescale` was given and made
    gradient: torch.Tensor,
    y: torch.Tensor,
    weight: torch.Tensor,
    factors: torch.Tensor,
    other: torch.Tensor | None,
    *,
    out: torch.Tensor,
    is_bare: bool = False,
) -> torch.Tensor:
    """As `worker.kernels.training.rescale_back`, of `rescale`."""
    d = y.shape[-1]
    adds = other is not None
    told = (out, gradient, y, other if adds else y, weight, factors, d)
    _launch(kernels.rescale_back, (y.numel() // d,), told, is_bare=is_bare, adds=adds, **_row(d))
    return out


def gated(gate: torch.Tensor, value: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    """Return silu(`gate`) · `value` [tokens, d] (SwiGLU, arXiv 2002.05202, eq. 6), rounded once."""
    n_tokens, d = out.shape
    blocks = (n_tokens, triton.cdiv(d, GATE_BLOCK))
    told = (out, gate, value, d, gate.stride(0), value.stride(0))
    _launch(kernels.gate, blocks, told, block=GATE_BLOCK)
    return out


def gated_back(gradient: torch.Tensor, both: torch.Tensor, *, out: _Pair) -> None:
    """As `worker.kernels.training.gated_back`, of `gated`."""
    to_both, y = out
    n_tokens, d = gradient.shape
    blocks = (n_tokens, triton.cdiv(d, GATE_BLOCK))
    told = (to_both, y, gradient, both, d, to_both.stride(0), both.stride(0))
    _launch(kernels.gate_back, blocks, told, block=GATE_BLOCK)


def turn(tokens: torch.Tensor, turns: _Pair, *, out: torch.Tensor, back: bool = False) -> None:
    """Put positions into heads, or with `back` make the gradient of what had none.

    Args:
        tokens: [tokens, heads, d], of which the numbers of a head follow each other.
        turns: Cosines and sines [tokens, d], contiguous.
        out: As `tokens`, or these themselves; is filled.
        back: Whether `tokens` are the gradient of the result.
    """
    n_tokens, n_heads, width = tokens.shape
    half = width // 2
    told = (out, tokens, *turns, n_heads, half, *out.stride()[:2], *tokens.stride()[:2])
    sizes = {"heads": triton.next_power_of_2(n_heads), "block": triton.next_power_of_2(half)}
    _launch(kernels.turn, (n_tokens,), told, back=back, **sizes)


def cross_entropy_(logits: torch.Tensor, labels: torch.Tensor, *, wants_gradient: bool) -> _Pair:
    """As `worker.kernels.training.cross_entropy_`; a label that names no logit gives NaN."""
    n, d = logits.shape
    losses = logits.new_empty(n, dtype=torch.float32)
    hits = logits.new_empty(n, dtype=torch.bool)
    block = min(LOGITS_BLOCK, triton.next_power_of_2(d))
    told = (logits, labels.contiguous(), losses, hits, d)
    _launch(
        kernels.cross_entropy, (n,), told, wants_gradient=wants_gradient, block=block, num_warps=8
    )
    return losses, hits


def _launch(kernel: Any, blocks: tuple[int, ...], told: tuple[Any, ...], **sizes: Any) -> None:
    """Start a kernel on the device of its first tensor, which need not be the current one."""
    with torch.cuda.device_of(told[0]):
        kernel[blocks](*told, **sizes)


def _row(d: int) -> dict[str, int]:
    """Return what a kernel that takes a whole token at a time is compiled for."""
    block = triton.next_power_of_2(d)
    return {"block": block, "num_warps": min(16, max(4, block // 512))}
