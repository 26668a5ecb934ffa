"""What an operation cannot do without, and the time below which a device cannot do it.

Only what every way has to do is counted: scores are multiplied out once in the forward pass, and once more in the
backward pass (keeping them would be a map of all pairs), a softmax takes one exponential for each of its weights, every
input is read and every output written once. The floor is the largest of the three times at the device's limits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
        return Work(
            self.products + other.products,
            self.exponentials + other.exponentials,
            self.elements + other.elements,
            self.results + other.results,
        )


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


def displacement(maps: Callable[[Shape], int], pairs: Callable[[Shape], float]) -> WorkOf:
    """Forward work of a displacement with `maps` softmax maps over `pairs` token pairs."""

    def work(shape: Shape) -> Work:
        tokens = shape.grid.video_tokens
        return Work(
            2 * shape.channels * pairs(shape),
            maps(shape) * pairs(shape),
            2 * shape.channels * tokens,
            2 * shape.frames * tokens,
        )

    return work


def displacement_backward(maps: Callable[[Shape], int], pairs: Callable[[Shape], float]) -> WorkOf:
    """Scores again, and the products for dq and dk."""
    forward = displacement(maps, pairs)

    def work(shape: Shape) -> Work:
        once = forward(shape)
        return Work(3 * once.products, once.exponentials, 2 * once.elements, once.results)

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


def _near_pairs(shape: Shape) -> float:
    video, text = shape.grid.video_tokens, shape.text_tokens
    return float(video * (shape.grid.tokens_per_frame + text) + text * shape.grid.tokens)


def frame_local(shape: Shape) -> Work:
    """Masked before the softmax: scores and weighted values of near pairs only."""
    pairs = _near_pairs(shape)
    return Work(4 * shape.channels * pairs, shape.heads * pairs, 4 * shape.channels * shape.grid.tokens, 0)


def frame_local_backward(shape: Shape) -> Work:
    """Scores again, and the products for dv, dP, dq and dk."""
    pairs = _near_pairs(shape)
    return Work(10 * shape.channels * pairs, shape.heads * pairs, 8 * shape.channels * shape.grid.tokens, 0)


def frame_local_zeroed(shape: Shape) -> Work:
    """Zeroed after the softmax: its sums run over all pairs, the weighted values over near ones."""
    pairs = float(shape.grid.tokens) ** 2
    products = 2 * shape.channels * (pairs + _near_pairs(shape))
    return Work(products, shape.heads * pairs, 4 * shape.channels * shape.grid.tokens, 0)


def frame_local_zeroed_backward(shape: Shape) -> Work:
    """Scores, dq and dk over all pairs, for the softmax couples them; dv and dP over near ones."""
    pairs = float(shape.grid.tokens) ** 2
    products = shape.channels * (6 * pairs + 4 * _near_pairs(shape))
    return Work(products, shape.heads * pairs, 8 * shape.channels * shape.grid.tokens, 0)
