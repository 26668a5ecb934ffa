"""A small fixed text encoder: a word list, hashed places for unknown words, and vectors that follow from a seed."""

import json
import os
import re
import warnings
import zlib
from typing import ClassVar

import numpy as np
import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor
from transformers import PreTrainedTokenizer

from corrdit.integrations.embedded.world.scene import BACKGROUNDS, COLOURS, DIRECTIONS, SPRITE_TEXTURES
from corrdit.integrations.embedded.world.shapes import SHAPES
from corrdit.integrations.embedded.world.variety import PHOTOGRAPH

PADDING, END = "<pad>", "<end>"
_FUNCTION_WORDS = (
    *("a", "an", "the", "and", "over", "camera", "is"),
    *("moves", "accelerates", "circles", "bounces", "turns", "grows", "shrinks", "stands", "still"),
    *("clockwise", "anticlockwise", "pans", "zooms", "in", "out"),
)
VOCABULARY_FILE = "vocabulary.json"
_MOST, _LONGEST = 8, 30
"""Unknown words that a warning names, and their letters."""


def world_vocabulary() -> list[str]:
    """Every word of the generated world's prompts, in a fixed order, after padding and end."""
    directions = [word for name in DIRECTIONS for word in name.split()]
    words = [*_FUNCTION_WORDS, *directions, *SHAPES, *SPRITE_TEXTURES, *COLOURS, *BACKGROUNDS]
    return list(dict.fromkeys([PADDING, END, *words]))


def _read_words(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8") as file:
            words = json.load(file)
    except ValueError as error:
        raise ValueError(f"{path} is not the JSON file that save_pretrained writes: {error}") from error
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words) or words[:2] != [PADDING, END]:
        raise ValueError(f"{path} must hold a list of words that begins with {PADDING} and {END}")
    return words


class WordTokenizer(PreTrainedTokenizer):
    """Lower-case words to ids; a word that is not in the list gets one of `hash_buckets` further ids by its CRC-32.

    Such words are warned of, each once, and come back from their ids as they were given.
    """

    vocab_files_names: ClassVar[dict[str, str]] = {"vocab_file": VOCABULARY_FILE}
    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file: str | None = None, hash_buckets: int = 256, **kwargs: object) -> None:
        self.words = world_vocabulary() if vocab_file is None else _read_words(vocab_file)
        self.word_ids = {word: index for index, word in enumerate(self.words)}
        self.hash_buckets = hash_buckets
        self._named: dict[int, str] = {}
        kwargs.setdefault("pad_token", PADDING)
        kwargs.setdefault("eos_token", END)
        super().__init__(hash_buckets=hash_buckets, **kwargs)

    @property
    def vocab_size(self) -> int:
        """Known words and hashed places together."""
        return len(self.words) + self.hash_buckets

    def get_vocab(self) -> dict[str, int]:
        """Known words to ids."""
        return dict(self.word_ids)

    def _tokenize(self, text: str, **kwargs: object) -> list[str]:
        words = re.findall(r"[^\W_]+", text.lower())
        self._name_unknown(words)
        return words

    def _name_unknown(self, words: list[str]) -> None:
        """Warns of words that are not in the list, of each once."""
        # Trained, though at a hashed place: the word came after the list.
        known = {*self.word_ids, PHOTOGRAPH}
        places = {word: self._convert_token_to_id(word) for word in words if word not in known}
        unknown = [word for word, place in places.items() if self._named.get(place) != word]
        if not unknown:
            return
        self._named.update({place: word for word, place in places.items()})
        named = ", ".join(repr(word if len(word) <= _LONGEST else f"{word[:_LONGEST]}...") for word in unknown[:_MOST])
        more = f" and {len(unknown) - _MOST} more words" if len(unknown) > _MOST else ""
        warnings.warn(
            f"the embedded model does not know {named}{more}: it has seen no video of that. It knows "
            f"{', '.join(SHAPES[:3])} and other shapes that move over {', '.join(BACKGROUNDS[:3])} ..., as in 'a red "
            "disc moves left over grass'",
            UserWarning,
            stacklevel=2,
        )

    def _convert_token_to_id(self, token: str) -> int:
        known = self.word_ids.get(token)
        return len(self.words) + zlib.crc32(token.encode()) % self.hash_buckets if known is None else known

    def _convert_id_to_token(self, index: int) -> str:
        if index < len(self.words):
            return self.words[index]
        return self._named.get(index, f"<unknown {index - len(self.words)}>")

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """The words, then the end token."""
        return [*token_ids_0, *(token_ids_1 or []), self.word_ids[END]]

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Write the word list as JSON; returns the path."""
        name = f"{filename_prefix}-{VOCABULARY_FILE}" if filename_prefix else VOCABULARY_FILE
        path = os.path.join(save_directory, name)
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self.words, file)
        return (path,)


class WordEncoder(ModelMixin, ConfigMixin):
    """Fixed vectors for word ids: the word's own, its place in the sentence, and a fading memory of the words before
    it.

    The memory tells the two subjects of a sentence apart, since the transformer's text tokens carry no position.
    Nothing is trained; all vectors follow from `seed` through numpy's generator.
    """

    @register_to_config
    def __init__(self, vocab_size: int = 320, embed_dim: int = 64, max_length: int = 32, seed: int = 7) -> None:
        super().__init__()
        rng = np.random.default_rng(seed)
        words = rng.standard_normal((vocab_size, embed_dim), dtype=np.float32)
        words[0] = 0.0
        self.register_buffer("words", torch.from_numpy(words))
        places = 0.5 * rng.standard_normal((max_length, embed_dim), dtype=np.float32)
        self.register_buffer("places", torch.from_numpy(places))

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        """input_ids: int64 [B, L]. Returns ([B, L, embed_dim],) as a transformers encoder would; padding gives
        zeros."""
        if input_ids.shape[1] > self.places.shape[0]:
            raise ValueError(f"at most {self.places.shape[0]} words are encoded, got {input_ids.shape[1]}")
        words = self.words[input_ids]
        memory = torch.zeros_like(words[:, 0])
        rows = []
        for position in range(words.shape[1]):
            rows.append(words[:, position] + self.places[position] + 0.6 * memory)
            memory = 0.7 * memory + 0.5 * words[:, position]
        present = (input_ids != 0)[..., None]
        return (torch.stack(rows, dim=1) * present,)
