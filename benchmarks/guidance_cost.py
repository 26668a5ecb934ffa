"""What a guided denoising step costs, against three branches run plainly.

One step of classifier-free guidance with a CogVideoX of 30 layers with random weights, layers 13, 17 and 21 perturbed,
and with the embedded model, its matching layer perturbed. Three ways, in turn: two branches without guidance; the same
inside CrossAttentionGuidance; and two branches plus a third whole forward whose perturbed layers get a mask of all
tokens by all tokens, as the released code does it. The guided prediction has to equal the plain third branch's before
any time is printed. Medians over the rounds with quartiles, one JSON object a line: seconds of the processor on a CPU,
which other programs on the machine do not lengthen, and of the clock on a GPU, there with the peak memory of each way.

    python benchmarks/guidance_cost.py [--rounds 5] [--heads 4] [--frames 9] [--rows 8] [--columns 12] [--device cpu]
"""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import CogVideoXPipeline
from experiment import RandomModel, Record, clock_of, new_parser
from torch import Tensor

from corrdit import CrossAttentionGuidance, TokenGrid, load_backbone
from corrdit.benchmark.environment import environment
from corrdit.integrations.diffusers.guidance.perturbations import SubstituteAttention
from corrdit.integrations.diffusers.host.attention import intercepting

PERTURBED = (13, 17, 21)
SCALE, CLASSIFIER_FREE_SCALE = 1.0, 6.0
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


class Step:
    """One denoising step of a pipeline in three ways; `prediction` is what the scheduler was given."""

    def __init__(self, pipe: CogVideoXPipeline, layers: tuple[int, ...], call: Record) -> None:
        self.pipe, self.layers, self.call = pipe, layers, call
        self.third_branch = False
        self.prediction = torch.empty(0)
        self._third: Tensor | None = None
        pipe.set_progress_bar_config(disable=True)
        pipe.transformer.register_forward_hook(self._after_forward, with_kwargs=True)
        self._scheduler_step = pipe.scheduler.step
        pipe.scheduler.step = self._recorded_step

    def run(self, guided: bool, third_branch: bool) -> None:
        self.third_branch = third_branch
        guidance = CrossAttentionGuidance(self.pipe, self.layers, SCALE) if guided else contextlib.nullcontext()
        with guidance:
            self.pipe(**self.call, generator=torch.Generator().manual_seed(0))

    def _recorded_step(self, prediction: Tensor, *args: object, **kwargs: object) -> object:
        self.prediction = prediction if self._third is None else prediction + SCALE * self._third.float()
        self._third = None
        return self._scheduler_step(prediction, *args, **kwargs)

    def _after_forward(
        self, transformer: torch.nn.Module, args: tuple[object, ...], kwargs: Record, output: tuple[Tensor]
    ) -> None:
        if not self.third_branch:
            return
        tensors = {name for name, value in kwargs.items() if isinstance(value, Tensor) and value.shape[0] == 2}
        half = {name: value[1:] if name in tensors else value for name, value in kwargs.items()}
        frames, height, width = (kwargs["hidden_states"].shape[index] for index in (1, 3, 4))
        text = kwargs["encoder_hidden_states"].shape[1]
        grid = TokenGrid(frames, height // 2, width // 2, text_tokens=text)
        with contextlib.ExitStack() as stack:
            for layer in self.layers:
                stack.callback(_masked(transformer.transformer_blocks[layer].attn1, grid))
            third = transformer.forward(**half)[0]
        self._third = output[0].chunk(2)[1] - third


def _masked(module: torch.nn.Module, grid: TokenGrid) -> Callable[[], object]:
    """Give a module full attention with a mask of all tokens by all tokens; returns what undoes it."""
    original = module.forward

    def attention(q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, *, scale: float, key_mask: Tensor | None) -> Tensor:
        frame = torch.full((grid.tokens,), -1, device=q.device)
        frame[grid.video_slice] = torch.arange(grid.frames, device=q.device).repeat_interleave(grid.tokens_per_frame)
        seen = (frame[:, None] == frame) | (frame[:, None] < 0) | (frame < 0)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)

    def forward(*args: object, **kwargs: object) -> object:
        with intercepting([SubstituteAttention(attention, grid, None)]):
            return original(*args, **kwargs)

    module.__dict__["forward"] = forward
    return lambda: module.__dict__.pop("forward")


def measure(step: Step, rounds: int, device: torch.device, dtype: torch.dtype) -> Record:
    ways = {"two branches": (False, False), "guided": (True, False), "three branches": (False, True)}
    predictions = {}
    for name, way in ways.items():
        step.run(*way)
        predictions[name] = step.prediction.float()
    error = float((predictions["guided"] - predictions["three branches"]).abs().max())
    error /= float(predictions["three branches"].abs().max())
    changed = float((predictions["guided"] - predictions["two branches"]).abs().max())
    if not error < TOLERANCE[dtype] or changed == 0:
        raise SystemExit(f"the guided prediction differs from the plain third branch by {error:.1e}; no times")
    on_gpu = device.type == "cuda"
    clock = clock_of(device, processor=not on_gpu)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    peaks = {}
    for _ in range(rounds):
        for name, way in ways.items():
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            began = clock()
            step.run(*way)
            seconds[name].append(clock() - began)
            if on_gpu:
                peaks[name] = torch.cuda.max_memory_allocated()
    rows = {name: statistics.quantiles(values, n=4) for name, values in seconds.items()}
    plain, guided, third = (rows[name][1] for name in ways)
    return {
        "error": error,
        "seconds_quartiles": rows,
        "extra_of_a_third_branch": (guided - plain) / (third - plain),
        "guided_over_plain": guided / plain,
        "peak_bytes": peaks or None,
    }


def main() -> None:
    parser = new_parser(__doc__, output=False)
    parser.add_argument("--rounds", type=int, default=5, help="at least 2, for quartiles")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--frames", type=int, default=9, help="latent frames")
    parser.add_argument("--rows", type=int, default=8, help="rows of tokens")
    parser.add_argument("--columns", type=int, default=12, help="columns of tokens")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {arguments.rounds}")
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    sizes = {name: getattr(arguments, name) for name in ("heads", "frames", "rows", "columns")}
    model = RandomModel(**sizes)
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(2, 1, model.text_tokens, model.text_channels, generator=generator).to(device, dtype)
    call = {"num_inference_steps": 1, "guidance_scale": CLASSIFIER_FREE_SCALE, "output_type": "latent"}
    prompts = {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1]}
    with torch.inference_mode():
        backbone = load_backbone("embedded", device=device, dtype=dtype)
        embedded_call = {**call, "prompt": "a red disc moves left over stripes"}
        for name, pipe, layers, tokens, words in (
            ("30 layers, random", model.pipeline(device, dtype), PERTURBED, model.tokens, {**call, **prompts}),
            ("embedded", backbone.pipe, (backbone.preset.reading.layer,), 24 + 8 * 64, embedded_call),
        ):
            row = measure(Step(pipe, layers, words), arguments.rounds, device, dtype)
            about = {"model": name, "layers": layers, "tokens": tokens}
            about |= {"heads": arguments.heads, "dtype": arguments.dtype}
            print(json.dumps({**about, **row, **environment(device)}), flush=True)


if __name__ == "__main__":
    main()
