"""Generating videos for many prompts over several processes, with guidance beside without."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader, Dataset

from corrdit.arguments import whole_number
from corrdit.files import written_beside
from corrdit.integrations.diffusers.backbones.presets import default_layers
from corrdit.integrations.diffusers.guidance.comparison import (
    DETAILS_FILE,
    check_generation,
    checked_rate,
    export_for_vbench,
    generate,
    vbench_name,
    write_generated,
)
from corrdit.integrations.diffusers.guidance.cross_attention import CrossAttentionGuidance
from corrdit.integrations.lightning.data_modules import EachOnceSampler
from corrdit.integrations.lightning.guidance_callback import GuidanceCallback
from corrdit.integrations.lightning.model_placement import preset_for_loading

SETTINGS_FILE = "settings.json"


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """The prompts of a UTF-8 text file, one a line; empty lines and lines that begin with # are passed over.

    Raises:
        ValueError: no such file, not UTF-8 text, or no prompt in it.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise ValueError(f"there is no file of prompts {path}; give a text file with one prompt a line") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); give a text file with one prompt a line") from None
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise ValueError(f"{path} holds no prompts; write one a line")
    return prompts


class PromptItems(Dataset[dict[str, Any]]):
    """Items `{"name", "prompt", "seed", "sample"}`."""

    def __init__(self, items: Sequence[dict[str, Any]]) -> None:
        self.items = list(items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


class PromptDataModule(lightning.LightningDataModule):
    """Prompts with their seeds, one at a time, for `Trainer.predict`; each once over all processes.

    Args:
        prompts: a text file with one prompt a line, or the prompts.
        samples: videos for each prompt.
        seed: of the first; sample k of prompt p gets `seed + p * samples + k`, whichever process generates it.
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
        output: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        # Fewer prompts are left than there are processes near the end of a resumed run.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.prompts = read_prompts(prompts) if isinstance(prompts, (str, os.PathLike)) else list(prompts)
        if not self.prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in self.prompts):
            raise ValueError("prompts must be at least one text, none of them empty")
        self.samples = whole_number("samples", samples, 1)
        self.seed = whole_number("seed", seed, 0)
        self.output = None if output is None else Path(output)
        self.items = self._numbered()
        self.pending = self.items

    def _numbered(self) -> list[dict[str, Any]]:
        made: Counter[str] = Counter()
        items = []
        for number, prompt in enumerate(self.prompts):
            for sample in range(self.samples):
                name = f"{number:04d}" + (f"_{sample}" if self.samples > 1 else "")
                seed = self.seed + number * self.samples + sample
                # A prompt that stands in the file twice goes on counting, so that no sample of it replaces another.
                items.append({"name": name, "prompt": prompt, "seed": seed, "sample": made[prompt]})
                made[prompt] += 1
        return items

    def setup(self, stage: str) -> None:
        """The first process looks which prompts are left, so that all share out the same list."""
        pending = [item for item in self.items if not self._is_done(item)]
        self.pending = pending if self.trainer is None else self.trainer.strategy.broadcast(pending)

    def _is_done(self, item: dict[str, Any]) -> bool:
        path = None if self.output is None else self.output / item["name"] / DETAILS_FILE
        if path is None or not path.is_file():
            return False
        earlier = _kept(path)
        if not {"prompt", "seed"} <= earlier.keys():
            raise _not_ours(path)
        if (earlier["prompt"], earlier["seed"]) != (item["prompt"], item["seed"]):
            raise ValueError(
                f"{path.parent} holds the video of another prompt or seed ({earlier['prompt']!r}, {earlier['seed']}), "
                f"not of {item['prompt']!r}, {item['seed']}; give another output folder"
            )
        return True

    def predict_dataloader(self) -> DataLoader[Any]:
        """One prompt a batch: `{"name", "prompt", "seed", "sample"}`."""
        dataset = PromptItems(self.pending)
        processes, rank = (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
        sampler = EachOnceSampler(dataset, processes, rank)
        return DataLoader(dataset, batch_size=1, sampler=sampler, collate_fn=_the_only_one, num_workers=0)


class GenerationModule(lightning.LightningModule):
    """Generates a video for each prompt `Trainer.predict` gives it and writes a folder of results for each.

    ```python
    module = GenerationModule("embedded", output="results", guidance={"layers": (3,), "scale": 1.0})
    Trainer().predict(module, PromptDataModule("prompts.txt", output="results"), return_predictions=False)
    ```

    `output/NAME/` gets `video.mp4`, `generation.json` and, with `guidance`, `plain.mp4` (the same seed without it) and
    `side_by_side.mp4`. A folder appears by one rename when all its files are written; with
    `PromptDataModule(..., output=output)` the next run does what is left. `output/settings.json` says how the results
    were made; a run with other settings is refused. To guide without the comparison, give the Trainer a
    `GuidanceCallback`, whose settings are kept too.

    Args:
        model: for `corrdit.load_backbone`, or a backbone that is loaded already.
        output: folder for the results, made if need be.
        model_preset: for `corrdit.load_backbone`: a `Preset` or a preset.json in place of the model's own.
        call: further arguments of the pipeline's call (num_frames, guidance_scale, ...).
        guidance: arguments of `corrdit.CrossAttentionGuidance`; {} takes the published layers, or the model's matching
            layer where none are published; None generates without.
        fps: frames per second of the files.
        dtype: precision of the model.
        vbench: also copy the videos into `output/vbench`, named as VBench's tool expects.

    Raises:
        ValueError: a rate that is not positive; when prediction starts, an unknown model, arguments that the pipeline
            or the guidance does not take, guidance from here and from a callback, a prompt too long for VBench's
            names, or results of other settings in `output`.
    """

    def __init__(
        self,
        model: Any = "embedded",
        *,
        output: str | os.PathLike[str],
        model_preset: Any = None,
        call: Mapping[str, Any] | None = None,
        guidance: Mapping[str, Any] | None = None,
        fps: float = 8.0,
        dtype: torch.dtype | None = None,
        vbench: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.model_dtype = model, dtype
        self.model_preset = preset_for_loading(model, model_preset)
        self.output = Path(output)
        self.call = dict(call or {})
        self.guidance = None if guidance is None else dict(guidance)
        self.fps, self.vbench = checked_rate(fps), vbench
        self.callback_guidance: dict[str, Any] | None = None
        self.backbone: Any = None

    def setup(self, stage: str) -> None:
        """Load the model on this process's device, and check arguments and the output folder."""
        if stage != "predict":
            raise ValueError(f"GenerationModule has no {stage} step; call Trainer.predict")
        self._check_run()
        self.backbone = self._loaded()
        check_generation(self.backbone.pipe, self.call)
        if self.guidance is not None:
            if self.guidance.get("layers") is None:
                self.guidance["layers"] = default_layers(self.backbone)
            CrossAttentionGuidance(self.backbone, **self.guidance)
        self._check_settings()
        self.trainer.strategy.barrier("settings read")
        if self.trainer.is_global_zero:
            self.output.mkdir(parents=True, exist_ok=True)
            with written_beside(self.output / SETTINGS_FILE, "w") as file:
                json.dump(self.settings(), file, indent=2)

    def _check_run(self) -> None:
        """What the Trainer brings: a callback that guides, and the prompts."""
        guiding = [callback for callback in self.trainer.callbacks if isinstance(callback, GuidanceCallback)]
        self.callback_guidance = guiding[0].options if guiding else None
        if guiding and self.guidance is not None:
            raise ValueError(
                "GenerationModule and a GuidanceCallback both have guidance; give guidance to the module for videos "
                "with and without it side by side, or the callback alone for guided ones"
            )
        data = getattr(self.trainer, "datamodule", None)
        if self.vbench and isinstance(data, PromptDataModule):
            for item in data.items:
                vbench_name(item["prompt"], item["sample"])

    def settings(self) -> dict[str, Any]:
        """How results are made, as `settings.json` keeps it."""
        facts = {
            "model": self.model if isinstance(self.model, str) else self.model.name,
            "call": self.call,
            "guidance": self.guidance,
            "guidance_callback": self.callback_guidance,
            "dtype": str(self.model_dtype),
            "fps": self.fps,
        }
        return json.loads(json.dumps(facts, default=str))

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Generate for one prompt.

        Args:
            batch: `{"name", "prompt", "seed", "sample"}` as `PromptDataModule` gives it.
            batch_idx: its number on this process.

        Returns:
            `{"name", "prompt", "seed", "seconds"}`.
        """
        began = time.perf_counter()
        generated = generate(self.backbone, batch["prompt"], batch["seed"], self.call, self.guidance, batch["sample"])
        folder = self.output / batch["name"]
        for left in self.output.glob(f".part-{batch['name']}-*"):
            shutil.rmtree(left)
        hidden = tempfile.mkdtemp(dir=self.output, prefix=f".part-{batch['name']}-")
        try:
            write_generated(hidden, generated, fps=self.fps, details=self.settings())
            if self.vbench:
                export_for_vbench(hidden, self.output, batch["prompt"], batch["sample"])
            os.chmod(hidden, 0o755)
            if folder.is_dir():
                shutil.rmtree(folder)
            os.replace(hidden, folder)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)
        facts = {name: batch[name] for name in ("name", "prompt", "seed")}
        return {**facts, "seconds": time.perf_counter() - began}

    def _loaded(self) -> Any:
        if not isinstance(self.model, (str, os.PathLike)):
            return self.model
        from corrdit.integrations.diffusers import load_backbone

        device = self.trainer.strategy.root_device
        return load_backbone(self.model, device=device, dtype=self.model_dtype, preset=self.model_preset)

    def _check_settings(self) -> None:
        path = self.output / SETTINGS_FILE
        if not path.is_file():
            return
        earlier = _kept(path)
        for name, value in self.settings().items():
            if earlier.get(name) != value:
                raise ValueError(
                    f"{self.output} holds results made with {name}={earlier.get(name)!r}, not {value!r}; give another "
                    "output folder, or the same settings to go on there"
                )


def _kept(path: Path) -> dict[str, Any]:
    """What an earlier run wrote.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        kept = None
    if not isinstance(kept, dict):
        raise _not_ours(path)
    return kept


def _not_ours(path: Path) -> ValueError:
    return ValueError(
        f"{path} is not what a generation writes; remove the folder {path.parent}, or give another output folder"
    )


def _the_only_one(items: list[dict[str, Any]]) -> dict[str, Any]:
    return items[0]
