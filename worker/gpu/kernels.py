"""The kernels. Numbers are read into float32, and rounded where PyTorch's operations round them.

Arguments are pointers and numbers. They have no types here: Triton compiles annotations, too.
"""

import triton
import triton.language as tl


@triton.jit
def rescale(  # noqa: PLR0913 - a kernel has its tensors and numbers as arguments
    y,
    total,
    x,
    z,
    weight,
    factors,
    d,
    epsilon,
    adds: tl.constexpr,
    block: tl.constexpr,
):
    """One token of y [tokens, d] = w · s / √(mean s² + ε), the quotient rounded before w.

    s is x, or x + z, rounded, which is put into `total`.
    """
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, block)
    inside = i < d
    at = token * d + i
    value = tl.load(x + at, mask=inside, other=0.0)
    if adds:
        other = tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
        value = (value.to(tl.float32) + other).to(value.dtype)
        tl.store(total + at, value, mask=inside)
    wide = value.to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / d + epsilon)
    normal = (wide * factor).to(value.dtype).to(tl.float32)
    w = tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, (normal * w).to(value.dtype), mask=inside)
    tl.store(factors + token, factor)


@triton.jit
def rescale_back(  # noqa: PLR0913
    result,
    gradient,
    y,
    other,
    weight,
    factors,
    d,
    is_bare: tl.constexpr,
    adds: tl.constexpr,
    block: tl.constexpr,
):
    """One token of the gradient of x, of `rescale`, plus what comes by another way if it `adds`.

    With `is_bare`, y is what it was before it was multiplied with w.
    """
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, block)
    inside = i < d
    at = token * d + i
    kept = tl.load(y + at, mask=inside, other=0.0)
    w = tl.load(weight + i, mask=inside, other=1.0).to(tl.float32)
    normal = kept.to(tl.float32)
    if not is_bare:
        normal = normal / w
    outer = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32) * w
    along = tl.sum(normal * outer, 0) / d
    sent = (outer - normal * along) * tl.load(factors + token)
    if adds:
        sent += tl.load(other + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(result + at, sent.to(kept.dtype), mask=inside)


@triton.jit
def _share(x):
    """Return 1 / (1 + exp(−x)), of no power that is infinite."""
    power = tl.exp(-tl.abs(x))
    return tl.where(x >= 0.0, 1.0, power) / (1.0 + power)


@triton.jit
def gate(  # noqa: PLR0913
    y,
    gates,
    values,
    d,
    by_gate,
    by_value,
    block: tl.constexpr,
):
    """A block of one token of y [tokens, d] = silu(g) · u; `by_…` tokens of g and u are apart."""
    token = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * block + tl.arange(0, block)
    inside = i < d
    g = tl.load(gates + token * by_gate + i, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(values + token * by_value + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + token * d + i, (g * _share(g) * u).to(y.dtype.element_ty), mask=inside)


@triton.jit
def gate_back(  # noqa: PLR0913
    to_both,
    y,
    gradient,
    both,
    d,
    by_result,
    by_token,
    block: tl.constexpr,
):
    """A block of one token of the gradients of g and u, side by side, and of y once more."""
    token = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * block + tl.arange(0, block)
    inside = i < d
    own = both + token * by_token + i
    g = tl.load(own, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(own + d, mask=inside, other=0.0).to(tl.float32)
    outer = tl.load(gradient + token * d + i, mask=inside, other=0.0).to(tl.float32)
    share = _share(g)
    active = g * share
    kind = y.dtype.element_ty
    to_gate = outer * u * (share + active * (1.0 - share))
    out = to_both + token * by_result + i
    tl.store(out, to_gate.to(kind), mask=inside)
    tl.store(out + d, (outer * active).to(kind), mask=inside)
    tl.store(y + token * d + i, (active * u).to(kind), mask=inside)


@triton.jit
def turn(  # noqa: PLR0913
    results,
    tokens,
    cosines,
    sines,
    n_heads,
    half,
    by_result,
    result_by_head,
    by_token,
    by_head,
    back: tl.constexpr,
    heads: tl.constexpr,
    block: tl.constexpr,
):
    """All heads of one token with its position put in, or with `back` the transpose of that.

    ``x·cos + rotate_half(x)·sin`` (arXiv 2104.09864, eq. 34, with halves for pairs). The result may
    take the place of what it is made of.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, heads)[:, None]
    i = tl.arange(0, block)[None, :]
    inside = (head < n_heads) & (i < half)
    own = tokens + token * by_token + head * by_head + i
    first = tl.load(own, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(own + half, mask=inside, other=0.0).to(tl.float32)
    place, known = token * 2 * half + i, i < half
    cosine = tl.load(cosines + place, mask=known, other=0.0).to(tl.float32)
    sine = tl.load(sines + place, mask=known, other=0.0).to(tl.float32)
    other_cosine = tl.load(cosines + place + half, mask=known, other=0.0).to(tl.float32)
    other_sine = tl.load(sines + place + half, mask=known, other=0.0).to(tl.float32)
    if back:
        one = first * cosine + second * other_sine
        two = second * other_cosine - first * sine
    else:
        one = first * cosine - second * sine
        two = second * other_cosine + first * other_sine
    out = results + token * by_result + head * result_by_head + i
    kind = results.dtype.element_ty
    tl.store(out, one.to(kind), mask=inside)
    tl.store(out + half, two.to(kind), mask=inside)


@triton.jit
def cross_entropy(  # noqa: PLR0913
    logits,
    labels,
    losses,
    hits,
    d,
    wants_gradient: tl.constexpr,
    block: tl.constexpr,
):
    """−log softmax(z)[label] of one row, in nats; its gradient takes the place of the logits z.

    The loss of a label that names no logit is not a number, which ends a job.
    """
    row = tl.program_id(0).to(tl.int64)
    z = logits + row * d
    label = tl.load(labels + row)
    known = (label >= 0) & (label < d)
    own = tl.load(z + label, mask=known, other=float("nan")).to(tl.float32)
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    before = tl.full((), 0, tl.int32)  # how many as large or larger come before the label
    for start in range(0, d, block):
        i = start + tl.arange(0, block)
        value = tl.load(z + i, mask=i < d, other=float("-inf")).to(tl.float32)
        found = tl.maximum(largest, tl.max(value, 0))
        total = total * tl.exp(largest - found) + tl.sum(tl.exp(value - found), 0)
        largest = found
        before += tl.sum(((value >= own) & (i < label)).to(tl.int32), 0)
    tl.store(losses + row, tl.log(total) + (largest - own))
    tl.store(hits + row, (own == largest) & (before == 0))
    if wants_gradient:
        for start in range(0, d, block):
            i = start + tl.arange(0, block)
            value = tl.load(z + i, mask=i < d, other=float("-inf")).to(tl.float32)
            share = tl.exp(value - largest) / total
            share = tl.where(i == label, share - 1.0, share)
            tl.store(z + i, share.to(logits.dtype.element_ty), mask=i < d)
