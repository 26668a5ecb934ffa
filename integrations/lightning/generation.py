"""Generating videos for many prompts over several processes, with guidance beside without."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypedDict

import torch

from corrdit.arguments import flag, whole_number
from corrdit.files import read_json, read_prompts
from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.diffusers.backbones.presets import Preset
from corrdit.integrations.diffusers.backbones.published_models import default_layers
from corrdit.integrations.diffusers.guidance.comparison import (
    DETAILS_FILE,
    check_generation,
    checked_rate,
    export_for_vbench,
    generate,
    generation_facts,
    list_for_vbench,
    write_generated,
)
from corrdit.integrations.diffusers.guidance.cross_attention import CrossAttentionGuidance
from corrdit.integrations.diffusers.placement import Placement
from corrdit.integrations.lightning.data_modules import EachOnceDataModule
from corrdit.integrations.lightning.guidance_callback import GuidanceCallback
from corrdit.integrations.lightning.resumable import Model, ResumableModule
from corrdit.runs import Inputs, Keywords, ResultFolder


class PromptItem(TypedDict):
    """A video to be generated: which of several videos of the same prompt is `sample`."""

    name: str
    prompt: str
    seed: int
    sample: int


class PromptDataModule(EachOnceDataModule[PromptItem]):
    """Prompts with their seeds, one at a time, for `Trainer.predict`; each once over all processes.

    Args:
        prompts: a text file with one prompt a line, or the prompts.
        samples: videos for each prompt.
        seed: of the first; sample k of prompt p gets `seed + p * samples + k`, whichever process generates it.
        same_seed: whether all prompts have the first one's seeds (sample k gets `seed + k`), as DiffTrack's scripts.
        output: results folder of the module that predicts; what is there already is left out, so that a run that was
            stopped goes on where it was. None predicts all.

    Raises:
        ValueError: no prompts, a number out of range or, when prediction starts, a result of another prompt or seed,
            or one that cannot be read.
    """

    def __init__(
        self,
        prompts: str | os.PathLike[str] | Sequence[str],
        *,
        samples: int = 1,
        seed: int = 0,
        same_seed: bool = False,
        output: str | os.PathLike[str] | None = None,
    ) -> None:
        self.prompts = read_prompts(prompts) if isinstance(prompts, (str, os.PathLike)) else list(prompts)
        if not self.prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in self.prompts):
            raise ValueError("prompts must be at least one text, none of them empty")
        self.samples = whole_number("samples", samples, 1)
        self.seed, self.same_seed = whole_number("seed", seed, 0), flag("same_seed", same_seed)
        self.items = self._numbered()
        self._by_name = {item["name"]: item for item in self.items}
        super().__init__(list(self._by_name), None if output is None else generation_results(output))

    def _numbered(self) -> list[PromptItem]:
        made: Counter[str] = Counter()
        items: list[PromptItem] = []
        for number, prompt in enumerate(self.prompts):
            for sample in range(self.samples):
                name = f"{number:04d}" + (f"_{sample}" if self.samples > 1 else "")
                seed = self.seed + sample + (0 if self.same_seed else number * self.samples)
                # A prompt that stands in the file twice goes on counting, so that no sample of it replaces another.
                items.append({"name": name, "prompt": prompt, "seed": seed, "sample": made[prompt]})
                made[prompt] += 1
        return items

    def sample(self, name: str) -> PromptItem:
        """Prompt and seed of a video."""
        return self._by_name[name]

    def inputs(self, name: str) -> Inputs:
        """Nothing but prompt and seed, which are compared by their values."""
        return {}

    def left(self) -> list[str]:
        """Names of the videos that are not there."""
        if self.results is not None:
            for item in self.items:
                self._refuse_other(item, self.results)
        return super().left()

    @staticmethod
    def _refuse_other(item: PromptItem, results: ResultFolder) -> None:
        path = results.record_file(item["name"])
        try:
            earlier = read_json(path)
        except FileNotFoundError:
            return
        except ValueError:
            earlier = {}
        if not {"prompt", "seed"} <= earlier.keys():
            raise ValueError(
                f"{path} is not what a generation writes; remove the folder {path.parent}, or give another output "
                "folder"
            )
        if (earlier["prompt"], earlier["seed"]) != (item["prompt"], item["seed"]):
            raise ValueError(
                f"{path.parent} holds the video of another prompt or seed ({earlier['prompt']!r}, {earlier['seed']}), "
                f"not of {item['prompt']!r}, {item['seed']}; give another output folder"
            )


def generation_results(output: str | os.PathLike[str]) -> ResultFolder:
    """The folder that a `GenerationModule` writes."""
    return ResultFolder(output, what="a generation", record=f"{{name}}/{DETAILS_FILE}")


class GenerationModule(ResumableModule[PromptItem]):
    """Generates a video for each prompt `Trainer.predict` gives it and writes a folder of results for each.

    ```python
    module = GenerationModule("embedded", output="results", guidance={"layers": (3,), "scale": 1.0})
    Trainer().predict(module, PromptDataModule("prompts.txt", output="results"), return_predictions=False)
    ```

    `output/NAME/` gets `video.mp4`, `sheet.png`, `generation.json` and, with `guidance`, `plain.mp4` (the same seed
    without it) and `side_by_side.mp4`. Videos appear by one rename when all of them are written, `generation.json`
    last; with `PromptDataModule(..., output=output)` the next run does what is left. `output/settings.json` says how
    the results were made; a run with other settings or weights is refused. To guide without the comparison, give the
    Trainer a `GuidanceCallback`, whose settings are kept too.

    Args:
        model: for `corrdit.load_backbone`, or a backbone that is loaded already.
        output: folder for the results, made if need be.
        model_preset: for `corrdit.load_backbone`: a `Preset` or a preset.json in place of the model's own.
        call: further arguments of the pipeline's call (num_frames, guidance_scale, ...).
        guidance: arguments of `corrdit.CrossAttentionGuidance`; {} takes the published layers, or the model's matching
            layer where none are published; None generates without.
        fps: frames per second of the files.
        dtype: precision of the model, as torch's type or by its name.
        vbench: also copy the videos into `output/vbench`, named as VBench's tool expects, with a list of what is cut.
        placement: where the parts of the model lie and in what form, or the word for where; see
            `corrdit.integrations.diffusers.placement.Placement`.
        on_broken: "raise" stops at a video that cannot be generated; "report" writes `failed.json` and goes on.

    Raises:
        ValueError: a rate that is not positive; when prediction starts, an unknown model, arguments that the pipeline
            or the guidance does not take, guidance from here and from a callback, or results of other settings in
            `output`.
    """

    sample_kind = "prompt"

    def __init__(
        self,
        model: Model = "embedded",
        *,
        output: str | os.PathLike[str],
        model_preset: Preset | str | os.PathLike[str] | None = None,
        call: Keywords | None = None,
        guidance: Keywords | None = None,
        fps: float = 8.0,
        dtype: torch.dtype | str | None = None,
        vbench: bool = False,
        placement: Placement | str = "device",
        on_broken: str = "raise",
    ) -> None:
        self.call = dict(call or {})
        self.guidance = None if guidance is None else dict(guidance)
        self.fps, self.vbench = checked_rate(fps), flag("vbench", vbench)
        super().__init__(
            model,
            generation_results(output),
            settings={"call": self.call, "fps": self.fps},
            model_preset=model_preset,
            dtype=dtype,
            placement=placement,
            on_broken=on_broken,
        )

    def check_settings(self) -> None:
        """What the Trainer brings, a callback that guides and the prompts, and what the folder holds."""
        guiding = [callback for callback in self.trainer.callbacks if isinstance(callback, GuidanceCallback)]
        if guiding and self.guidance is not None:
            raise ValueError(
                "GenerationModule and a GuidanceCallback both have guidance; give guidance to the module for videos "
                "with and without it side by side, or the callback alone for guided ones"
            )
        self.settings["guidance_callback"] = guiding[0].options if guiding else None
        super().check_settings()

    def prepare(self, backbone: Backbone) -> Mapping[str, object]:
        """Check the pipeline's arguments and the guidance against the model; gives the guidance."""
        check_generation(backbone.pipe, self.call)
        if self.guidance is not None:
            if self.guidance.get("layers") is None:
                self.guidance["layers"] = default_layers(backbone)
            CrossAttentionGuidance(backbone, **self.guidance)
        self.backbone = backbone
        return {"guidance": self.guidance}

    def on_predict_end(self) -> None:
        """List the videos of VBench's layout once every process is done."""
        data = getattr(self.trainer, "datamodule", None)
        if self.vbench and isinstance(data, PromptDataModule):
            self.trainer.strategy.barrier("all videos done")
            if self.trainer.is_global_zero:
                list_for_vbench(self.output, [(item["prompt"], item["sample"]) for item in data.items])

    def make(self, sample: PromptItem) -> Mapping[str, object]:
        """Generate for one prompt; gives prompt and seed."""
        name, prompt, seed, number = sample["name"], sample["prompt"], sample["seed"], sample["sample"]
        generated = generate(self.backbone, prompt, seed, self.call, self.guidance, number)
        with self.results.result(name, {}) as result:
            write_generated(result.folder, generated, fps=self.fps)
            if self.vbench:
                export_for_vbench(result.folder, self.output, prompt, number)
            result.facts.update({**generation_facts(generated, self.fps), **self.settings})
        return {"prompt": prompt, "seed": seed}
