"""Where the tokens of a word stand in the text tokens of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PromptWords:
    """A prompt and its tokens.

    Args:
        prompt: as it was given to the pipeline.
        tokenizer: of the pipeline; None where it has none.
        embedded: whether the prompt came as embeddings, so that no text is known.
    """

    prompt: str
    tokenizer: Any
    embedded: bool = False

    def places(self, word: str) -> tuple[int, ...]:
        """Positions of a word's tokens among the text tokens, where it stands first.

        Raises:
            ValueError: a word that is not in the prompt, or a prompt whose tokens are not known.
        """
        if self.tokenizer is None or self.embedded:
            raise ValueError(
                f"where the word {word!r} stands is not known: the prompt came as embeddings or the pipeline has no "
                "tokenizer; give a prompt as text"
            )
        whole = _tokens(self.tokenizer, self.prompt)
        for spelled in (word, f" {word}"):
            wanted = _tokens(self.tokenizer, spelled)
            for start in range(len(whole) - len(wanted) + 1):
                if wanted and whole[start : start + len(wanted)] == wanted:
                    return tuple(range(start, start + len(wanted)))
        raise ValueError(
            f"the word {word!r} is not in the prompt {self.prompt!r}; name one that is, as it stands there"
        )


def _tokens(tokenizer: Any, text: str) -> Sequence[int]:
    """Token ids without those that mark the end."""
    special = set(getattr(tokenizer, "all_special_ids", ()))
    return [token for token in tokenizer(text).input_ids if token not in special]
