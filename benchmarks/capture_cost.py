"""What a capture of one layer at one step costs a generation, beyond the operation itself.

A CogVideoX of 30 layers with random weights makes 2,800 tokens, with and without a capture of one layer at the last
step, in turn. Outputs have to be bit-identical before any time is printed. Three runs are compared: plain, with a
capture whose operation does nothing (the cost of capturing), and with a capture that computes the soft displacement
(the cost a user sees), whose own time is measured inside the operation. Medians over the rounds, with the spread
between the quartiles.

On a machine whose times scatter by more than one per cent, whole generations cannot resolve one per cent. So the cost
is also measured in its two parts, in seconds, where the rest is small: `fixed`, 30 layers of a few tokens (all that
does not grow with the tokens), and `layer`, one layer of 2,800 tokens (all that does, and the fixed part once more).
Their sum, over the plain seconds of 30 layers, bounds the cost: `bound_percent`, with the 97.5 % end of its bootstrap
interval as `bound_percent_high`.

    python benchmarks/capture_cost.py [--rounds 7] [--parts-rounds 60] [--steps 1] [--heads 4] [--device cpu]
        [--clock wall] [--output FILE]

`--clock cpu` counts the processor time of this process instead, for a machine that is busy with other work.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from corrdit import capture, ops
from corrdit.benchmark.environment import environment
from corrdit.files import written_beside

LAYERS = 30
LAYER = 17
FRAMES, ROWS, COLUMNS, TEXT_TOKENS = 13, 11, 18, 226
TEXT_CHANNELS = 64


@dataclass(frozen=True)
class Size:
    """Layers and tokens of the random model, and the layer that is captured."""

    layers: int = LAYERS
    layer: int = LAYER
    frames: int = FRAMES
    rows: int = ROWS
    columns: int = COLUMNS
    text_tokens: int = TEXT_TOKENS

    @property
    def tokens(self) -> int:
        return self.text_tokens + self.frames * self.rows * self.columns


WHOLE = Size()
FIXED = Size(frames=3, rows=2, columns=2, text_tokens=4)
SINGLE_LAYER = Size(layers=1, layer=0)


def build_pipeline(heads: int, device: str, size: Size = WHOLE) -> Any:
    """A random CogVideoX with heads of 64 and `size`, which by default makes 226 + 13 * 11 * 18 = 2,800 tokens."""
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel

    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=64,
        num_layers=size.layers,
        text_embed_dim=TEXT_CHANNELS,
        sample_height=2 * size.rows,
        sample_width=2 * size.columns,
        sample_frames=4 * (size.frames - 1) + 1,
        max_text_seq_length=size.text_tokens,
    )
    scheduler = CogVideoXDDIMScheduler(timestep_spacing="trailing")
    pipe = CogVideoXPipeline(None, None, None, transformer.eval(), scheduler).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def soft_displacement(q: torch.Tensor, k: torch.Tensor, grid: Any, key_mask: torch.Tensor | None) -> torch.Tensor:
    return ops.soft_displacement(q, k, grid, key_mask=key_mask)


def nothing(q: torch.Tensor, k: torch.Tensor, grid: Any, key_mask: torch.Tensor | None) -> None:
    """The operation that leaves only the cost of capturing."""


class Timed:
    """An operation that adds up the time it takes."""

    def __init__(self, operation: Callable[..., Any], clock: Callable[[], float]) -> None:
        self.operation = operation
        self.clock = clock
        self.seconds = 0.0

    def __call__(self, *inputs: Any) -> Any:
        start = self.clock()
        result = self.operation(*inputs)
        self.seconds += self.clock() - start
        return result


def generate(pipe: Any, steps: int) -> torch.Tensor:
    """Latents of one unguided generation from fixed noise."""
    text_tokens = pipe.transformer.config.max_text_seq_length
    prompt = torch.zeros(1, text_tokens, TEXT_CHANNELS, device=pipe.device)
    noise = torch.Generator().manual_seed(0)
    return pipe(
        prompt_embeds=prompt, guidance_scale=1.0, num_inference_steps=steps, output_type="latent", generator=noise
    ).frames


def clock_of(kind: str, device: str) -> Callable[[], float]:
    """Seconds by the wall clock or of processor time, once the device has finished its work."""
    read = {"wall": time.perf_counter, "cpu": time.process_time}[kind]

    def seconds() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return read()

    return seconds


def measure(
    pipe: Any, steps: int, operation: Callable[..., Any] | None, clock: Callable[[], float], layer: int = LAYER
) -> tuple[torch.Tensor, float, float]:
    """Latents, seconds of the whole generation, and seconds of the operation in it."""
    start = clock()
    if operation is None:
        latents = generate(pipe, steps)
        return latents, clock() - start, 0.0
    timed = Timed(operation, clock)
    with capture(pipe, layers=[layer], steps=[-1], operation=timed):
        latents = generate(pipe, steps)
    return latents, clock() - start, timed.seconds


def spread(values: list[float]) -> tuple[float, float]:
    """Median and distance between the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return middle, high - low


def extra_seconds(size: Size, rounds: int, heads: int, device: str, clock: Callable[[], float]) -> torch.Tensor:
    """What capturing adds to a one-step generation of `size`, seconds [rounds]: pairs in turn, first and second
    swapped every round."""
    pipe = build_pipeline(heads, device, size)
    for operation in (None, nothing):
        measure(pipe, 1, operation, clock, size.layer)
    differences = []
    for index in range(rounds):
        order = (None, nothing) if index % 2 else (nothing, None)
        seconds = {operation: measure(pipe, 1, operation, clock, size.layer)[1] for operation in order}
        differences.append(seconds[nothing] - seconds[None])
    return torch.tensor(differences, dtype=torch.float64)


def bound(plain: float, rounds: int, heads: int, device: str, clock: Callable[[], float]) -> dict[str, float]:
    """The cost of a capture as the sum of its parts, against `plain` seconds of the whole model's generation."""
    parts = {"fixed": FIXED, "layer": SINGLE_LAYER}
    extra = {name: extra_seconds(size, rounds, heads, device, clock) for name, size in parts.items()}
    drawn = torch.randint(rounds, (2000, rounds), generator=torch.Generator().manual_seed(0))
    total = sum(values[drawn].median(dim=1).values for values in extra.values())
    middle = {name: float(values.median()) for name, values in extra.items()}
    return {f"{name}_milliseconds": round(1e3 * value, 3) for name, value in middle.items()} | {
        "bound_percent": round(100 * sum(middle.values()) / plain, 3),
        "bound_percent_high": round(100 * float(torch.quantile(total, 0.975)) / plain, 3),
    }


def run(rounds: int, parts_rounds: int, steps: int, heads: int, device: str, clock_kind: str) -> dict[str, Any]:
    """One row of results.

    Raises:
        RuntimeError: a capture changed the generated latents.
    """
    pipe = build_pipeline(heads, device)
    clock = clock_of(clock_kind, device)
    kinds: dict[str, Callable[..., Any] | None] = {"plain": None, "nothing": nothing, "displacement": soft_displacement}
    reference = {name: measure(pipe, steps, operation, clock)[0] for name, operation in kinds.items()}
    if not all(torch.equal(latents, reference["plain"]) for latents in reference.values()):
        raise RuntimeError("a capture changed the generated latents; no time is printed")
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    extra: dict[str, list[float]] = {"nothing": [], "displacement": []}
    for _ in range(rounds):
        plain = measure(pipe, steps, None, clock)[1]
        seconds["plain"].append(plain)
        for name, ratios in extra.items():
            _, total, inside = measure(pipe, steps, kinds[name], clock)
            seconds[name].append(total)
            ratios.append((total - inside) / plain - 1)
    row: dict[str, Any] = {
        "tokens": WHOLE.tokens,
        "layers": WHOLE.layers,
        "heads": heads,
        "steps": steps,
        "rounds": rounds,
        "clock": clock_kind,
    }
    for name, values in seconds.items():
        row[f"{name}_seconds"], row[f"{name}_spread"] = (round(value, 4) for value in spread(values))
    for name, values in extra.items():
        middle, between = spread(values)
        row[f"{name}_extra_percent"] = round(100 * middle, 2)
        row[f"{name}_extra_spread_percent"] = round(100 * between, 2)
    return row | bound(statistics.median(seconds["plain"]), parts_rounds, heads, device, clock)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--parts-rounds", type=int, default=60)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"))
    parser.add_argument("--output", type=pathlib.Path, help="file for the row and how it was taken")
    arguments = parser.parse_args()
    row = run(
        arguments.rounds,
        arguments.parts_rounds,
        arguments.steps,
        arguments.heads,
        arguments.device,
        arguments.clock,
    )
    report = {
        "command": " ".join(["python", "benchmarks/capture_cost.py", *sys.argv[1:]]),
        **environment(torch.device(arguments.device)),
        "load_average": pathlib.Path("/proc/loadavg").read_text(encoding="ascii").split()[:3],
        **row,
    }
    print(json.dumps(report, indent=1))
    if arguments.output:
        with written_beside(arguments.output, "w") as file:
            json.dump(report, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
