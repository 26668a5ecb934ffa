"""Whole denoising steps of published models with random weights, beside what `corrdit plan` says of them.

    python benchmarks/whole_steps.py --device cuda --minutes 8 --output FILE

At the size each model was made for: a step under classifier-free guidance (`plain`), the same with one layer's motion
flow read (`capture`), with cross-attention guidance that removes keys before the softmax or drops weights after it
(`removed`, `dropped`), a step without guidance, which a third branch would add (`one branch`), and a guided step of
DiTFlow with one step of its optimiser (`transfer`, gradients checkpointed). Ways of a model are timed in turns, by
events on a GPU; memory is the peak beyond weights. Text encoders and codec do not run. The same command goes on with
what the file lacks. Exit status 3 when the minutes are over before all is measured.
"""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from experiment import Record, facts, new_parser, read_json, write_rows
from torch import Tensor

from corrdit import CrossAttentionGuidance, MotionTransfer, TokenGrid, capture, ops
from corrdit.benchmark.measure import peak_extra_bytes, time_interleaved
from corrdit.files import markdown_table
from corrdit.integrations.diffusers.backbones.published_models import default_layers
from corrdit.integrations.diffusers.planning.configured_model import ConfiguredModel, configured_model
from corrdit.integrations.diffusers.planning.plan import DEFAULT_SIZE, Plan, plan
from corrdit.integrations.diffusers.planning.tasks import PlannedTask, Request
from corrdit.memory import is_out_of_memory

MODELS = ("cogvideox-5b", "cogvideox-2b", "wan-2.1-14b", "hunyuanvideo")
TRANSFER = {"gradient_checkpointing": True, "optimisation_steps": 1}
SAME = ("commit", "device", "torch", "triton")
UNFINISHED = 3


@dataclass(frozen=True)
class Way:
    """How a step is made.

    Args:
        work: makes it once.
        task: as `plan` names it, with further arguments of its own.
        planned: those.
        phase: of the plan.
    """

    work: Callable[[], object]
    task: str
    planned: Record
    phase: str = "denoising step"


def ways(model: ConfiguredModel, size: Sequence[int]) -> dict[str, Way]:
    """Every way of a model, `plain` first."""
    backbone = model.backbone
    layers, one = default_layers(backbone), (backbone.preset.reading.layer,)
    guided = PlannedTask(model, Request("generate", *size))
    single = PlannedTask(model, Request("generate", *size, guided=False))
    settings = MotionTransfer(backbone, **TRANSFER).settings
    transfer = {
        phase.name: phase.run for phase in PlannedTask(model, Request("transfer", *size, settings=settings)).phases()
    }

    def motion(q: Tensor, k: Tensor, grid: TokenGrid, key_mask: Tensor | None) -> Tensor:
        return ops.soft_displacement(q, k, grid, key_mask=key_mask)

    def captured() -> object:
        with capture(backbone.pipe, layers=one, operation=motion) as found:
            return guided.step(), found

    def perturbed(renormalize: bool) -> Callable[[], object]:
        def work() -> object:
            with CrossAttentionGuidance(backbone, layers=layers, renormalize=renormalize):
                return guided.step()

        return work

    transfer["reading the reference"]()
    return {
        "plain": Way(guided.step, "generate", {"guided": True}),
        "capture": Way(captured, "capture", {"guided": True, "layers": one}),
        "removed": Way(perturbed(True), "generate", {"guided": True, "cag": True, "layers": layers}),
        "dropped": Way(perturbed(False), "generate", {"guided": True, "cag": True, "layers": layers}),
        "one branch": Way(single.step, "generate", {"guided": False}),
        "transfer": Way(transfer["guided step"], "transfer", {"settings": TRANSFER}, "guided step"),
    }


def measured(name: str, size: Sequence[int] | None, rounds: int, device: torch.device) -> list[Record]:
    """A row of each way, times of all of them taken in turns."""
    torch.manual_seed(0)
    model = configured_model(name, device=device, random=True)
    with model.running():
        return list(_rows(name, model, size or model.size or DEFAULT_SIZE, rounds, device))


def _rows(
    name: str, model: ConfiguredModel, size: Sequence[int], rounds: int, device: torch.device
) -> Iterator[Record]:
    tried, peaks, died = ways(model, size), dict[str, int](), dict[str, str]()
    for way, how in tried.items():
        gc.collect()
        try:
            how.work()  # compiles, and fills what is kept
            peaks[way] = peak_extra_bytes(_nothing_returned(how.work), device)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            died[way] = "out of memory"
    works = {way: _nothing_returned(tried[way].work) for way in peaks}
    times, failed = time_interleaved(works, device, dict.fromkeys(works, rounds))
    died |= {way: f"{type(error).__name__}: {error}" for way, error in failed.items()}
    for way, how in tried.items():
        expected = _planned(name, how, size, device)
        phase = next(phase for phase in expected.phases if phase.name == how.phase)
        row: Record = {
            "model": name, "size": list(size), "tokens": expected.tokens, "text_tokens": expected.text_tokens,
            "way": way, "planned_bytes": sum(phase.parts.values()),
        }  # fmt: skip
        if way in died or way not in times:
            yield {**row, "failed": died[way]}
            continue
        found = times[way]
        row |= {"milliseconds": found.median, "least": found.least, "most": found.most, "rounds": found.count}
        row |= {"over_plain": found.median / times["plain"].median if "plain" in times else None}
        row |= {"peak_bytes": peaks[way], "plan_error": row["planned_bytes"] / max(peaks[way], 1) - 1}
        if how.task != "transfer":
            row["teraflops"] = phase.flop / phase.times / found.median / 1e9
        yield row


def _nothing_returned(work: Callable[[], object]) -> Callable[[], Sequence[Tensor]]:
    def call() -> Sequence[Tensor]:
        work()
        return ()

    return call


def _planned(name: str, how: Way, size: Sequence[int], device: torch.device) -> Plan:
    frames, height, width = size
    return plan(
        name, how.task, frames=frames, height=height, width=width, device=device.type, search=False, **how.planned
    )


def main() -> int:
    parser = new_parser(__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS, help="names that corrdit plan takes")
    parser.add_argument(
        "--size", nargs=3, type=int, metavar=("FRAMES", "HEIGHT", "WIDTH"), help="in place of their own"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no further model after so many")
    arguments = parser.parse_args()
    began, device = time.monotonic(), torch.device(arguments.device)
    result = {**facts(device), "rows": []}
    if arguments.output.exists():
        held = read_json(arguments.output)
        if different := [name for name in SAME if held[name] != result[name]]:
            parser.error(f"--output {arguments.output} was measured with another {', '.join(different)}; name another")
        result["rows"] = held["rows"]
    left = [name for name in arguments.models if name not in {row["model"] for row in result["rows"]}]
    for name in left:
        if (time.monotonic() - began) / 60 > arguments.minutes:
            return UNFINISHED
        result["rows"] += measured(name, arguments.size, arguments.rounds, device)
        write_rows(arguments.output, result)
        torch.cuda.empty_cache()
    print(table(result["rows"]))
    return 0


def table(rows: Sequence[Record]) -> str:
    """What a terminal is shown."""
    shown = ("model", "way", "milliseconds", "over_plain", "peak_bytes", "planned_bytes")
    return markdown_table(list(shown), [[str(row.get(name, row.get("failed"))) for name in shown] for row in rows])


if __name__ == "__main__":
    sys.exit(main())
