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
from collections.abc import Callable

import torch
from diffusers import CogVideoXPipeline
from experiment import DRAWS, RandomModel, Record, clock_of, facts, new_parser, write_json
from torch import Tensor

from corrdit import TokenGrid, capture, ops

LAYER = 17
Operation = Callable[[Tensor, Tensor, TokenGrid, Tensor | None], Tensor | None]
Clock = Callable[[], float]


def soft_displacement(q: Tensor, k: Tensor, grid: TokenGrid, key_mask: Tensor | None) -> Tensor:
    return ops.soft_displacement(q, k, grid, key_mask=key_mask)


def nothing(q: Tensor, k: Tensor, grid: TokenGrid, key_mask: Tensor | None) -> None:
    """The operation that leaves only the cost of capturing."""


def generate(pipe: CogVideoXPipeline, steps: int) -> Tensor:
    """Latents of one unguided generation from fixed noise."""
    config = pipe.transformer.config
    prompt = torch.zeros(1, config.max_text_seq_length, config.text_embed_dim, device=pipe.device)
    noise = torch.Generator().manual_seed(0)
    return pipe(
        prompt_embeds=prompt, guidance_scale=1.0, num_inference_steps=steps, output_type="latent", generator=noise
    ).frames


def measure(
    pipe: CogVideoXPipeline, steps: int, operation: Operation | None, clock: Clock
) -> tuple[Tensor, float, float]:
    """Latents, seconds of the whole generation, and seconds of the operation in it."""
    inside = 0.0

    def timed(q: Tensor, k: Tensor, grid: TokenGrid, key_mask: Tensor | None) -> Tensor | None:
        nonlocal inside
        assert operation is not None
        start = clock()
        result = operation(q, k, grid, key_mask)
        inside += clock() - start
        return result

    start = clock()
    if operation is None:
        latents = generate(pipe, steps)
    else:
        layer = min(LAYER, len(pipe.transformer.transformer_blocks) - 1)
        with capture(pipe, layers=[layer], steps=[-1], operation=timed):
            latents = generate(pipe, steps)
    return latents, clock() - start, inside


def spread(values: list[float]) -> tuple[float, float]:
    """Median and distance between the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return middle, high - low


def extra_seconds(model: RandomModel, rounds: int, device: torch.device, clock: Clock) -> Tensor:
    """What capturing adds to a one-step generation, seconds [rounds]: pairs in turn, first and second swapped every
    round."""
    pipe = model.pipeline(device)
    differences = []
    for index in range(-1, rounds):  # the first warms up
        order = (None, nothing) if index % 2 else (nothing, None)
        seconds = {operation: measure(pipe, 1, operation, clock)[1] for operation in order}
        differences.append(seconds[nothing] - seconds[None])
    return torch.tensor(differences[1:], dtype=torch.float64)


def bound(plain: float, rounds: int, heads: int, device: torch.device, clock: Clock) -> dict[str, float]:
    """The cost of a capture as the sum of its parts, against `plain` seconds of the whole model's generation."""
    parts = {
        "fixed": RandomModel(heads=heads, frames=3, rows=2, columns=2, text_tokens=4),
        "layer": RandomModel(heads=heads, layers=1),
    }
    extra = {name: extra_seconds(model, rounds, device, clock) for name, model in parts.items()}
    drawn = torch.randint(rounds, (DRAWS, rounds), generator=torch.Generator().manual_seed(0))
    total = sum(values[drawn].median(dim=1).values for values in extra.values())
    middle = {name: float(values.median()) for name, values in extra.items()}
    return {f"{name}_milliseconds": round(1e3 * value, 3) for name, value in middle.items()} | {
        "bound_percent": round(100 * sum(middle.values()) / plain, 3),
        "bound_percent_high": round(100 * float(torch.quantile(total, 0.975)) / plain, 3),
    }


def run(arguments: argparse.Namespace, device: torch.device) -> Record:
    model, steps = RandomModel(heads=arguments.heads), arguments.steps
    pipe, clock = model.pipeline(device), clock_of(device, processor=arguments.clock == "cpu")
    kinds: dict[str, Operation | None] = {"plain": None, "nothing": nothing, "displacement": soft_displacement}
    reference = {name: measure(pipe, steps, operation, clock)[0] for name, operation in kinds.items()}
    if not all(torch.equal(latents, reference["plain"]) for latents in reference.values()):
        raise RuntimeError("a capture changed the generated latents; no time is printed")
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    extra: dict[str, list[float]] = {"nothing": [], "displacement": []}
    for _ in range(arguments.rounds):
        for name, operation in kinds.items():
            _, total, inside = measure(pipe, steps, operation, clock)
            seconds[name].append(total)
            if operation is not None:
                extra[name].append((total - inside) / seconds["plain"][-1] - 1)
    row: Record = {"tokens": model.tokens, "layers": model.layers}
    row |= {name: getattr(arguments, name) for name in ("heads", "steps", "rounds", "clock")}
    for name, values in seconds.items():
        row[f"{name}_seconds"], row[f"{name}_spread"] = (round(value, 4) for value in spread(values))
    for name, values in extra.items():
        percents = (round(100 * value, 2) for value in spread(values))
        row[f"{name}_extra_percent"], row[f"{name}_extra_spread_percent"] = percents
    plain = statistics.median(seconds["plain"])
    return row | bound(plain, arguments.parts_rounds, arguments.heads, device, clock)


def main() -> None:
    parser = new_parser(__doc__, output=False)
    for name, default in {"rounds": 7, "parts-rounds": 60, "steps": 1, "heads": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"))
    parser.add_argument("--output", type=pathlib.Path, help="file for the row and how it was taken")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    report = {**facts(device), **run(arguments, device)}
    print(json.dumps(report, indent=1))
    if arguments.output:
        write_json(arguments.output, report)


if __name__ == "__main__":
    main()
