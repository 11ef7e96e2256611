"""What all loops are made of: numbers of either kind as float32, and sums of products.

An element is bfloat16, held as uint16, or float32. Everything is computed in float32.
"""

from typing import Any

import numpy as np
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from worker.kernels.team import OPTIONS


def _pointer(context: Any, address: Any) -> Any:
    """Make a pointer of a number."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


pointer: Any = intrinsic(_pointer)


def get(array: Any, i: Any) -> Any:
    """Return an element in float32; uint16 is bfloat16. Inside of loops Numba takes `_get_of`."""
    raise NotImplementedError("only loops, which are compiled, read elements")


@overload(get)
def _get_of(array: Any, i: Any) -> Any:
    def get(array: Any, i: Any) -> Any:
        return array[i]

    def get_widened(array: Any, i: Any) -> Any:
        return np.uint32(np.uint32(array[i]) << np.uint32(16)).view(np.float32)

    return get_widened if array.dtype == types.uint16 else get


def put(array: Any, i: Any, value: Any) -> None:
    """Set an element, rounded to the nearest, of two to the even one. Numba takes `_put_of`."""
    raise NotImplementedError("only loops, which are compiled, set elements")


@overload(put)
def _put_of(array: Any, i: Any, value: Any) -> Any:
    def put(array: Any, i: Any, value: Any) -> None:
        array[i] = value

    def put_rounded(array: Any, i: Any, value: Any) -> None:
        bits = np.float32(value).view(np.uint32)
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        # NaNs stay such: those that arithmetic makes, and those of bfloat16, have no low bits.
        array[i] = np.uint16((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))

    return put_rounded if array.dtype == types.uint16 else put


@njit(**OPTIONS)
def copy(source: Any, target: Any) -> None:
    for i in range(target.shape[0]):
        put(target, i, get(source, i))


@njit(**OPTIONS)
def product(x: Any, row: Any) -> Any:
    total = np.float32(0)
    for i in range(x.shape[0]):
        total += x[i] * get(row, i)
    return total


@njit(**OPTIONS)
def products_of_four(x: Any, a: Any, r: int, h: Any) -> None:
    """Set four numbers of each of four rows of `h` to products of `x` [4, …] with rows of `a`, from
    row `r` on: sixteen sums stay in registers.
    """
    x0, x1, x2, x3, a0, a1, a2, a3 = x[0], x[1], x[2], x[3], a[r], a[r + 1], a[r + 2], a[r + 3]
    h0 = h1 = h2 = h3 = i0 = i1 = i2 = i3 = np.float32(0)
    j0 = j1 = j2 = j3 = k0 = k1 = k2 = k3 = np.float32(0)
    for n in range(x0.shape[0]):
        b0, b1, b2, b3 = a0[n], a1[n], a2[n], a3[n]
        y0, y1, y2, y3 = x0[n], x1[n], x2[n], x3[n]
        h0, h1, h2, h3 = h0 + y0 * b0, h1 + y0 * b1, h2 + y0 * b2, h3 + y0 * b3
        i0, i1, i2, i3 = i0 + y1 * b0, i1 + y1 * b1, i2 + y1 * b2, i3 + y1 * b3
        j0, j1, j2, j3 = j0 + y2 * b0, j1 + y2 * b1, j2 + y2 * b2, j3 + y2 * b3
        k0, k1, k2, k3 = k0 + y3 * b0, k1 + y3 * b1, k2 + y3 * b2, k3 + y3 * b3
    h[0, r], h[0, r + 1], h[0, r + 2], h[0, r + 3] = h0, h1, h2, h3
    h[1, r], h[1, r + 1], h[1, r + 2], h[1, r + 3] = i0, i1, i2, i3
    h[2, r], h[2, r + 1], h[2, r + 2], h[2, r + 3] = j0, j1, j2, j3
    h[3, r], h[3, r + 1], h[3, r + 2], h[3, r + 3] = k0, k1, k2, k3


@njit(**OPTIONS)
def add(y: Any, row: Any, share: Any) -> None:
    for i in range(y.shape[0]):
        y[i] += share * get(row, i)


@njit(**OPTIONS)
def add_four(y: Any, b: Any, r: int, h: Any) -> None:
    """Add to `y` four rows of `b`, from row `r` on, times four of `h`: a short `y` waits less."""
    b0, b1, b2, b3 = b[r], b[r + 1], b[r + 2], b[r + 3]
    h0, h1, h2, h3 = h[r], h[r + 1], h[r + 2], h[r + 3]
    for i in range(y.shape[0]):
        y[i] += h0 * get(b0, i) + h1 * get(b1, i) + h2 * get(b2, i) + h3 * get(b3, i)


@njit(**OPTIONS)
def add_to_two(y0: Any, y1: Any, b: Any, r: int, h: Any) -> None:
    """Add to `y0` and `y1` four rows of `b`, from row `r` on, times four numbers a row of `h`."""
    b0, b1, b2, b3 = b[r], b[r + 1], b[r + 2], b[r + 3]
    h0, h1, h2, h3 = h[0, r], h[0, r + 1], h[0, r + 2], h[0, r + 3]
    k0, k1, k2, k3 = h[1, r], h[1, r + 1], h[1, r + 2], h[1, r + 3]
    for i in range(y0.shape[0]):
        c0, c1, c2, c3 = b0[i], b1[i], b2[i], b3[i]
        y0[i] += h0 * c0 + h1 * c1 + h2 * c2 + h3 * c3
        y1[i] += k0 * c0 + k1 * c1 + k2 * c2 + k3 * c3


@njit(**OPTIONS)
def exp(x: Any) -> Any:
    """Return e^x within 2 of its last bits, for x <= 0; vectorised, which the library's is not."""
    x = max(x, np.float32(-87.0))
    whole = np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
    # ln 2 in two parts (Cody and Waite 1980), so that the difference is exact.
    rest = x - whole * np.float32(0.693359375) + whole * np.float32(2.12194440e-4)
    value = np.float32(1.9875691500e-4)
    value = value * rest + np.float32(1.3981999507e-3)
    value = value * rest + np.float32(8.3334519073e-3)
    value = value * rest + np.float32(4.1665795894e-2)
    value = value * rest + np.float32(1.6666665459e-1)
    value = value * rest + np.float32(5.0000001201e-1)
    value = value * rest * rest + rest + np.float32(1)
    return value * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(**OPTIONS)
def _turned(bits: Any) -> Any:
    """Make integers in the order of numbers of the bits of these, and the other way round."""
    return np.int32(bits ^ np.int32((bits >> np.int32(31)) & np.int32(2**31 - 1)))


@njit(**OPTIONS)
def largest_of(x: Any) -> Any:
    """Return the largest number; NaN where one is.

    Integers are compared, which is vectorised, unlike comparing numbers.
    """
    largest, n_none = np.int32(-(2**31)), np.int32(0)
    for i in range(x.shape[0]):
        number = np.float32(get(x, i))
        largest = max(largest, _turned(number.view(np.int32)))
        n_none += np.int32(number != number)
    bits = np.int32(_turned(largest))
    return np.float32(np.nan) if n_none else bits.view(np.float32)


@njit(**OPTIONS)
def share_of(total: Any, largest: Any) -> Any:
    """Return what powers e^(x - largest) of that total are multiplied by; NaN if it was not finite.

    Then what is not finite shows in all shares, though `exp` of it does not.
    """
    return np.float32(1) / total if abs(largest) < np.float32(np.inf) else np.float32(np.nan)
