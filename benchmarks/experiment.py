"""What the experiments share: command line, facts of a run, files of JSON, intervals, weights, a random model."""

from __future__ import annotations

import argparse
import hashlib
import json
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from corrdit.benchmark.environment import environment
from corrdit.files import written_beside

if TYPE_CHECKING:
    from diffusers import CogVideoXPipeline

    from corrdit.integrations.embedded.pipeline import EmbeddedVideoPipeline

RESULTS = pathlib.Path(__file__).parent / "results"
CPU = torch.device("cpu")
DRAWS = 2000
Record = dict[str, Any]
"""An object of JSON."""


def new_parser(description: str | None, *, output: bool = True, pipeline: bool = False) -> argparse.ArgumentParser:
    """A parser that keeps the lines of a description.

    output: with a required --output, a JSON file; pipeline: with --pipeline, the embedded one in another folder.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if output:
        parser.add_argument("--output", type=pathlib.Path, required=True, help="JSON file to write")
    if pipeline:
        parser.add_argument("--pipeline", help="folder of a trained pipeline; the shipped one otherwise")
    return parser


def facts(device: torch.device = CPU) -> Record:
    """Command, commit, device, versions and load, as they stand in a file of results."""
    command = " ".join(["python", f"benchmarks/{pathlib.Path(sys.argv[0]).name}", *sys.argv[1:]])
    load = pathlib.Path("/proc/loadavg").read_text(encoding="ascii").split()[:3]
    return {"command": command, **environment(device), "load_average": load}


def facts_apart() -> Record:
    """The same with the command beside the rest, for results whose environment is an entry."""
    environment = facts()
    return {"command": environment.pop("command"), "environment": environment}


def read_json(path: pathlib.Path) -> Record:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: pathlib.Path, result: object, indent: int | None = 1) -> None:
    with written_beside(path, "w") as file:
        file.write(json.dumps(result, indent=indent) + "\n")


def write_rows(path: pathlib.Path, result: Record) -> None:
    """As `write_json`, with each of `rows` on a line of its own, after all else."""
    head = json.dumps({name: value for name, value in result.items() if name != "rows"}, indent=1)
    rows = ",\n".join(f"  {json.dumps(row)}" for row in result["rows"])
    with written_beside(path, "w") as file:
        file.write(head.removesuffix("\n}") + f',\n "rows": [\n{rows}\n ]\n}}\n')


def kept(path: pathlib.Path, make: Callable[[], Any], *, begin: bool = True) -> Any:
    """The part of a result that a file holds, made first where it is not there yet; None if it may not be begun."""
    if not path.is_file():
        if not begin:
            return None
        write_json(path, make(), indent=None)
    return read_json(path)


def share_of(text: str) -> tuple[int, int]:
    """The words I/N of a process that does the I-th of N shares of the work."""
    share, shares = (int(number) for number in text.split("/"))
    return share, shares


def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float, float]:
    """Mean, and lower and upper end of its 95 % bootstrap interval."""
    values = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(len(values), size=(DRAWS, len(values)))
    low, high = np.quantile(values[drawn].mean(axis=1), (0.025, 0.975))
    return float(values.mean()), float(low), float(high)


def weights_digest(transformer: torch.nn.Module) -> str:
    """Which weights the figures belong to: the start of the SHA-256 of all of them in float16."""
    digest = hashlib.sha256()
    for name, tensor in sorted(transformer.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.to(torch.float16).cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def sampled(pipe: EmbeddedVideoPipeline, prompts: Sequence[str], seeds: Sequence[int], **call: object) -> np.ndarray:
    """Generated videos, uint8 [B, T, H, W, 3]; each has noise of its own seed."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    frames = pipe(list(prompts), generator=generators, output_type="np", **call).frames
    return (np.asarray(frames) * 255).round().astype(np.uint8)


def clock_of(device: torch.device, *, processor: bool = False) -> Callable[[], float]:
    """Seconds by the wall clock or of processor time, once the device has finished its work."""
    read = time.process_time if processor else time.perf_counter

    def seconds() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return read()

    return seconds


@dataclass(frozen=True)
class RandomModel:
    """A CogVideoX with random weights and heads of 64; frames, rows and columns count tokens."""

    layers: int = 30
    heads: int = 4
    frames: int = 13
    rows: int = 11
    columns: int = 18
    text_tokens: int = 226
    text_channels: int = 64

    @property
    def tokens(self) -> int:
        return self.text_tokens + self.frames * self.rows * self.columns

    def pipeline(self, device: torch.device, dtype: torch.dtype = torch.float32) -> CogVideoXPipeline:
        """Takes embedded prompts and gives latents."""
        from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel

        torch.manual_seed(0)
        transformer = CogVideoXTransformer3DModel(
            num_attention_heads=self.heads,
            attention_head_dim=64,
            num_layers=self.layers,
            text_embed_dim=self.text_channels,
            sample_height=2 * self.rows,
            sample_width=2 * self.columns,
            sample_frames=4 * (self.frames - 1) + 1,
            max_text_seq_length=self.text_tokens,
        )
        scheduler = CogVideoXDDIMScheduler(timestep_spacing="trailing")
        pipe = CogVideoXPipeline(None, None, None, transformer.eval().to(dtype), scheduler).to(device)
        pipe.set_progress_bar_config(disable=True)
        return pipe
