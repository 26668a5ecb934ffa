"""What an operation cannot do without, and the time below which a device cannot do it.

Only what every way has to do is counted: scores are multiplied out once in the forward pass, and once more in the
backward pass (keeping them would be a map of all pairs), a softmax takes one exponential for each of its weights, every
input is read and every output written once. The floor is the largest of the three times at the device's limits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass

from corrdit.benchmark.shapes import Shape

WINDOW = 4
QUERY_TOKENS = 256
_RESULT_BYTES = 4


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches in the three things everything is made of.

    Attributes:
        matmul_tflops: 1e12 floating-point operations a second in matrix products.
        copy_gigabytes: 1e9 bytes a second, those read plus those written.
        exponentials: 1e9 powers of two a second.
    """

    matmul_tflops: float
    copy_gigabytes: float
    exponentials: float

    @property
    def label(self) -> str:
        return (
            f"{self.matmul_tflops:.3g} TFLOP/s of matrix products, {self.copy_gigabytes:.0f} GB/s copied, "
            f"{self.exponentials:.0f}e9 exponentials/s"
        )


# One H200 in bfloat16: the first two measured, the exponentials 132 multiprocessors x 16 a cycle x 1.83 GHz.
H200 = Ceilings(790.0, 4300.0, 3870.0)


@dataclass(frozen=True)
class Work:
    """What a call has to do.

    Attributes:
        products: floating-point operations of matrix products, two for a multiplication and an addition.
        exponentials: exponentials of softmax.
        elements: numbers in the precision of the inputs that are read or written.
        results: float32 numbers that are read or written.
    """

    products: float
    exponentials: float
    elements: float
    results: float

    def __add__(self, other: Work) -> Work:
        return Work(*(one + more for one, more in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Floor:
    """The least milliseconds of a call, and which of the device's limits sets them."""

    milliseconds: float
    bound: str


def floor_of(work: Work, ceilings: Ceilings, element_bytes: int) -> Floor:
    """The floor of some work for inputs of `element_bytes` a number."""
    bytes_moved = work.elements * element_bytes + work.results * _RESULT_BYTES
    times = {
        "matrix product": work.products / (ceilings.matmul_tflops * 1e9),
        "exponentials": work.exponentials / (ceilings.exponentials * 1e6),
        "copy": bytes_moved / (ceilings.copy_gigabytes * 1e6),
    }
    bound = max(times, key=lambda name: times[name])
    return Floor(times[bound], bound)


WorkOf = Callable[[Shape], Work]


def displacement(maps: Callable[[Shape], int], pairs: Callable[[Shape], float], *, backward: bool = False) -> WorkOf:
    """Work of a displacement with `maps` softmax maps over `pairs` token pairs.

    The backward pass has the scores again, and the products for dq and dk.
    """

    def work(shape: Shape) -> Work:
        tokens = shape.grid.video_tokens
        products, elements = (6, 4) if backward else (2, 2)
        return Work(
            products * shape.channels * pairs(shape),
            maps(shape) * pairs(shape),
            elements * shape.channels * tokens,
            2 * shape.frames * tokens,
        )

    return work


def all_pairs(shape: Shape) -> float:
    return float(shape.grid.video_tokens) ** 2


def window_pairs(shape: Shape) -> float:
    """Pairs of a token and a key within `WINDOW` rows and columns of its place, in all frame pairs."""

    def seen(length: int) -> int:
        return sum(min(place + WINDOW, length - 1) - max(place - WINDOW, 0) + 1 for place in range(length))

    return float(shape.frames**2 * seen(shape.height) * seen(shape.width))


def match(directions: int) -> WorkOf:
    """Source frame 0 against all others."""

    def work(shape: Shape) -> Work:
        tokens, others = shape.grid.tokens_per_frame, shape.frames - 1
        pairs = directions * others * tokens**2
        read = shape.channels * tokens * (shape.frames if directions == 1 else 2 * shape.frames)
        return Work(2 * shape.channels * pairs, shape.heads * pairs, read, 3 * others * tokens)

    return work


def cost_rows(shape: Shape) -> Work:
    """The chosen rows, and in the other direction the whole softmax sums they are divided by."""
    tokens, chosen = shape.grid.tokens_per_frame, min(QUERY_TOKENS, shape.grid.tokens_per_frame)
    pairs = shape.frames * (tokens**2 + chosen * tokens)
    read = 2 * shape.channels * shape.grid.video_tokens
    return Work(2 * shape.channels * pairs, shape.heads * pairs, read, chosen * shape.grid.video_tokens)


def attention_mass(shape: Shape) -> Work:
    chosen = min(QUERY_TOKENS, shape.grid.tokens_per_frame)
    pairs = chosen * shape.grid.tokens
    read = shape.channels * (chosen + shape.grid.tokens)
    return Work(2 * shape.channels * pairs, shape.heads * pairs, read, chosen * 2 * (1 + shape.frames))


def frame_local(*, zeroed: bool, backward: bool = False) -> WorkOf:
    """Work of attention within frames: scores and weighted values.

    The backward pass has the scores again, and the products for dv, dP, dq and dk. Masked before the softmax, all run
    over near pairs only; zeroed after it, what the softmax couples (its sums, the scores, dq and dk) runs over all.
    """

    def work(shape: Shape) -> Work:
        video, text, tokens = shape.grid.video_tokens, shape.text_tokens, shape.grid.tokens
        near = float(video * (shape.grid.tokens_per_frame + text) + text * tokens)
        coupled = float(tokens) ** 2 if zeroed else near
        products = 6 * coupled + 4 * near if backward else 2 * coupled + 2 * near
        elements = 8 if backward else 4
        return Work(shape.channels * products, shape.heads * coupled, elements * shape.channels * tokens, 0)

    return work
