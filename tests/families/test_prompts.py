"""A prompt is encoded as the family's own pipeline gives it to its transformer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from corrdit.integrations.diffusers.layouts import forward_arguments
from corrdit.testing import TINY_MODELS, tiny_backbone, tiny_generation

CHANNELS = 16
NAMES = [name for name, model in TINY_MODELS.items() if not (model.variant or model.packed) and name != "wananimate"]
PROMPT = "a red disc moves left"


def embeds(tokens: int, channels: int = CHANNELS) -> torch.Tensor:
    return torch.randn(1, tokens, channels, generator=torch.Generator().manual_seed(tokens))


def mask(tokens: int) -> torch.Tensor:
    return (torch.arange(tokens)[None] < tokens - 3).long()


class Stopped(Exception):
    """Ends a pipeline at its transformer."""


class Encoder:
    """A text encoder and its tokenizer, for pipelines that call both inside a longer function."""

    dtype = torch.float32
    device = torch.device("cpu")
    padding_side = "left"
    model_max_length = 512

    def __call__(self, *args: Any, max_length: int | None = None, **kwargs: Any) -> Any:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if torch.is_tensor(ids):
            hidden = embeds(ids.shape[-1])
            return _Outputs(hidden_states=(hidden, hidden, hidden), first=hidden)
        length = max_length or 6
        tokens = SimpleNamespace(input_ids=torch.zeros(1, length, dtype=torch.long), attention_mask=mask(length))
        tokens.to = lambda device: tokens
        return tokens

    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        return "text"

    def batch_decode(self, ids: Any) -> list[str]:
        return [""]


class _Outputs(SimpleNamespace):
    def __getitem__(self, index: int) -> torch.Tensor:
        return self.first


def give_text(pipe: Any, patch: pytest.MonkeyPatch) -> None:
    """What makes embeddings of words is replaced; what the pipeline does with them stays."""
    answers = {
        "_get_t5_prompt_embeds": lambda tokens: (embeds(tokens), mask(tokens)),
        "_get_prompt_embeds": lambda tokens: (embeds(tokens), mask(tokens)),
        "_get_gemma_prompt_embeds": lambda tokens: (embeds(tokens), mask(tokens)),
        "_get_llama_prompt_embeds": lambda tokens: (embeds(tokens), mask(tokens)),
        "_get_clip_prompt_embeds": lambda tokens: embeds(1, 8)[:, 0],
        "_get_mllm_prompt_embeds": lambda tokens: (embeds(8), mask(8)),
        "_get_byt5_prompt_embeds": lambda tokens: (embeds(4, 6), mask(4)),
        "_encode_prompt_qwen": lambda tokens: (embeds(tokens), torch.tensor([0, tokens], dtype=torch.int32)),
        "_encode_prompt_clip": lambda tokens: embeds(1, 6)[:, 0],
    }
    if type(pipe).__name__ == "Kandinsky6TI2VAPipeline":
        answers = {"_get_prompt_embeds": lambda tokens: (embeds(tokens), embeds(1, 6)[:, 0], mask(tokens).bool())}
    masked = type(pipe).__name__.startswith(("LTX", "Mochi", "MotifVideo", "Kandinsky6"))
    for name, answer in answers.items():
        if not hasattr(pipe, name):
            continue
        plain = name in ("_get_t5_prompt_embeds", "_get_prompt_embeds") and not masked

        def given(
            *args: Any, answer: Any = answer, plain: bool = plain, max_sequence_length: int = 8, **kwargs: Any
        ) -> Any:
            # Kandinsky 6 gives it without its name, behind two encoders and their tokenizers.
            found = answer(args[5] if len(args) > 5 else max_sequence_length)
            return found[0] if plain else found

        patch.setattr(pipe, name, given, raising=False)
    for part in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        if part in pipe.components:
            object.__setattr__(pipe, part, Encoder())


@pytest.mark.parametrize("name", NAMES)
def test_prompts_are_encoded_as_the_pipeline_encodes_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone(name)
    pipe = backbone.pipe
    give_text(pipe, monkeypatch)
    seen: list[dict[str, Any]] = []

    def stop(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(forward_arguments(module, args, kwargs))
        raise Stopped

    call = {key: value for key, value in tiny_generation(name).items() if "prompt" not in key and "mask" not in key}
    call.pop("max_sequence_length", None)
    if TINY_MODELS[name].guidance is not None:
        call[TINY_MODELS[name].guidance] = 1.0
    handle = pipe.transformer.register_forward_pre_hook(stop, with_kwargs=True)
    with torch.no_grad():
        found = backbone.encoded_prompt(PROMPT)
    # Their tiny models have room for fewer tokens than the pipelines' default.
    short = name.startswith(("cogvideox", "consisid", "mochi"))
    with pytest.raises(Stopped):
        pipe(prompt=PROMPT, **call, **({"max_sequence_length": backbone.text_tokens} if short else {}))
    handle.remove()
    assert set(found) == set(backbone.prompt_shapes)
    blank = backbone.blank_prompt()
    for argument, value in found.items():
        given = torch.as_tensor(seen[0][argument])
        # LTX-2 guides its audio by itself, in a batch of both branches, the conditional one last.
        torch.testing.assert_close(value.flatten(), given.to(value).flatten()[-value.numel() :])
        assert blank[argument].shape[-1] == value.shape[-1]
