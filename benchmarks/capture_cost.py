"""What a capture of one layer at one step costs a generation, beyond the operation itself.

A CogVideoX of 30 layers with random weights makes 2,800 tokens for some steps, with and without a capture of one layer
at the last step, in turn. Outputs have to be bit-identical before any time is printed. Three runs are compared: plain,
with a capture whose operation does nothing (the cost of capturing), and with a capture that computes the soft
displacement (the cost a user sees), whose own time is measured inside the operation. Medians over the rounds, with the
spread between the quartiles.

    python benchmarks/capture_cost.py [--rounds 7] [--steps 2] [--heads 4] [--device cpu] [--clock wall]

`--clock cpu` counts the processor time of this process instead, for a machine that is busy with other work.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from corrdit import capture, ops

LAYERS = 30
LAYER = 17
FRAMES, ROWS, COLUMNS, TEXT_TOKENS = 13, 11, 18, 226
TEXT_CHANNELS = 64


def build_pipeline(heads: int, device: str) -> Any:
    """A random CogVideoX of 30 layers, heads of 64, whose default size makes 226 + 13 * 11 * 18 = 2,800 tokens."""
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel

    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=64,
        num_layers=LAYERS,
        text_embed_dim=TEXT_CHANNELS,
        sample_height=2 * ROWS,
        sample_width=2 * COLUMNS,
        sample_frames=4 * (FRAMES - 1) + 1,
        max_text_seq_length=TEXT_TOKENS,
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
    prompt = torch.zeros(1, TEXT_TOKENS, TEXT_CHANNELS, device=pipe.device)
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
    pipe: Any, steps: int, operation: Callable[..., Any] | None, clock: Callable[[], float]
) -> tuple[torch.Tensor, float, float]:
    """Latents, seconds of the whole generation, and seconds of the operation in it."""
    start = clock()
    if operation is None:
        latents = generate(pipe, steps)
        return latents, clock() - start, 0.0
    timed = Timed(operation, clock)
    with capture(pipe, layers=[LAYER], steps=[-1], operation=timed):
        latents = generate(pipe, steps)
    return latents, clock() - start, timed.seconds


def spread(values: list[float]) -> tuple[float, float]:
    """Median and distance between the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return middle, high - low


def run(rounds: int, steps: int, heads: int, device: str, clock_kind: str) -> dict[str, Any]:
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
        "tokens": TEXT_TOKENS + FRAMES * ROWS * COLUMNS,
        "layers": LAYERS,
        "heads": heads,
        "steps": steps,
        "rounds": rounds,
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU",
        "clock": clock_kind,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    for name, values in seconds.items():
        row[f"{name}_seconds"], row[f"{name}_spread"] = (round(value, 4) for value in spread(values))
    for name, values in extra.items():
        middle, between = spread(values)
        row[f"{name}_extra_percent"] = round(100 * middle, 2)
        row[f"{name}_extra_spread_percent"] = round(100 * between, 2)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"))
    arguments = parser.parse_args()
    row = run(arguments.rounds, arguments.steps, arguments.heads, arguments.device, arguments.clock)
    print(json.dumps(row))


if __name__ == "__main__":
    main()
