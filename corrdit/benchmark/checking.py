"""Inputs of a timed call, and the comparison with float64 that it has to pass first."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from corrdit.benchmark.comparisons import Comparison, Results, Scene
from corrdit.benchmark.measure import Call
from corrdit.benchmark.shapes import Shape
from corrdit.grid import TokenGrid

# Largest error over largest value. Half precision rounds logits of the baselines; ours must stay far below this, and
# the error stands in the row.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}
# Share of argmaxes that may differ: near ties are decided by the last bit.
MISMATCHES = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}
# The materialising reference is the truth while its maps are smaller than this.
REFERENCE_BYTES = 2**30
# Share of the variance of queries and keys that follows the moving pattern.
LIKENESS = 0.7
# Stands for NaN and infinity, which JSON does not have.
HUGE = 1e30


def scene(shape: Shape, grid: TokenGrid, device: torch.device, dtype: torch.dtype, gradient: bool) -> Scene:
    """Queries and keys of a pattern that moves one column to the right each frame, and random values.

    Random queries and keys alone have no best match: in half precision the argmax of any way would be chance. The same
    inputs each time on a device; a row that leaves on the right comes back on the left.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(1, shape.heads, *size, shape.head_dim, generator=generator, device=device)

    pattern = normal(grid.height, grid.width)
    q, k, v = (normal(grid.tokens) for _ in range(3))
    for frame in range(grid.frames):
        moved = (LIKENESS**0.5 * pattern.roll(frame, dims=3)).flatten(2, 3)
        for tensor in (q, k):
            part = tensor[:, :, grid.frame_slice(frame)]
            part.mul_((1 - LIKENESS) ** 0.5).add_(moved)
    return Scene(grid, *(tensor.to(dtype).requires_grad_(gradient) for tensor in (q, k, v)))


def work(run: Callable[[Scene], Results], inputs: Scene, backward: bool) -> Call:
    """A call that gives the results, and with `backward` the gradients of the inputs that have any after them."""
    if not backward:
        return lambda: run(inputs)
    with torch.no_grad():
        result = run(inputs)[0]
    # Rounded alike for every precision, so that float64 is asked the same question.
    generator = torch.Generator(result.device).manual_seed(1)
    incoming = torch.randn(result.shape, generator=generator, device=result.device).bfloat16().to(result.dtype)
    tensors = (inputs.q, inputs.k, inputs.v)

    def forward_and_backward() -> Results:
        (output,) = run(inputs)
        gradients = torch.autograd.grad(output, tensors, incoming, allow_unused=True)
        return (output.detach(), *(gradient for gradient in gradients if gradient is not None))

    return forward_and_backward


@dataclasses.dataclass(frozen=True)
class Truth:
    """Results in float64 of the inputs as they are in the working precision.

    Attributes:
        source: which backend computed them.
    """

    inputs: Scene
    expected: Results
    backward: bool
    source: str

    @classmethod
    def of(
        cls,
        comparison: Comparison,
        shape: Shape,
        *,
        frames: int,
        backward: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Truth:
        """The truth on the first frames of a shape."""
        grid = dataclasses.replace(shape.grid, frames=frames)
        inputs = scene(shape, grid, device, dtype, backward)
        exact = (tensor.detach().double().requires_grad_(backward) for tensor in (inputs.q, inputs.k, inputs.v))
        map_tokens = grid.tokens_per_frame if comparison.pair_maps else grid.tokens
        source = "reference" if 8 * shape.heads * map_tokens**2 <= REFERENCE_BYTES else "streaming"
        results = work(lambda inputs: comparison.run(inputs, source), Scene(grid, *exact), backward)()
        return cls(inputs, tuple(result.detach() for result in results), backward, source)

    def compare(self, run: Callable[[Scene], Results]) -> dict[str, object]:
        """The error of a competitor, as it stands in its row."""
        results = work(run, self.inputs, self.backward)()
        error, mismatches = 0.0, 0.0
        for result, exact in zip(results, self.expected, strict=True):
            # Argmaxes, which count tokens, are right or wrong, not near.
            if exact.shape[-1] == 2 and bool((exact == exact.round()).all()):
                mismatches = max(mismatches, float((result.double() != exact.double()).any(-1).double().mean()))
            else:
                largest = max(float(exact.abs().max()), 1e-30)
                difference = (result.detach().double() - exact).abs().nan_to_num(HUGE, HUGE)
                error = max(error, min(float(difference.max()) / largest, HUGE))
        dtype = self.inputs.q.dtype
        good = error <= TOLERANCE[dtype] and mismatches <= MISMATCHES[dtype]
        return {
            "error": error,
            "mismatches": mismatches,
            "within_tolerance": good,
            "checked_against": f"{self.source} in float64, {self.inputs.grid.frames} frames",
        }
