"""The embedded codec loses nothing; the text encoder is fixed, knows the world's words and survives others."""

from __future__ import annotations

import pathlib
import warnings

import pytest
import torch

from corrdit.integrations.embedded.codec import HaarVideoCodec
from corrdit.integrations.embedded.pipeline import TEXT_TOKENS, build_pipeline, build_transformer
from corrdit.integrations.embedded.text import WordEncoder, WordTokenizer, world_vocabulary
from corrdit.integrations.embedded.world import describe
from corrdit.integrations.embedded.world.scene import draw_scene


def test_codec_round_trip_and_frames_by_themselves() -> None:
    codec = HaarVideoCodec()
    video = torch.rand(2, 3, 4, 12, 20, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = codec.encode(video).latent_dist.sample()
    assert latents.shape == (2, 12, 4, 6, 10)
    torch.testing.assert_close(codec.decode(latents).sample, video, atol=2e-6, rtol=0)
    alone = codec.encode(video[:, :, 2:3]).latent_dist.mode()
    torch.testing.assert_close(alone, latents[:, :, 2:3], atol=0, rtol=0)


def test_codec_channels_are_the_haar_bands_of_the_colour_axes() -> None:
    codec = HaarVideoCodec()
    gray = torch.ones(1, 3, 1, 2, 2)
    latent = codec.encode(gray).latent_dist.mode().flatten()
    # A gray cell has brightness only: sqrt(3) along the first colour axis, 2 along the mean of four pixels.
    expected = torch.zeros(12)
    expected[0] = 3**0.5 * 2 * codec.config.colour_gains[0] * codec.config.detail_gains[0]
    torch.testing.assert_close(latent, expected, atol=1e-6, rtol=0)
    columns = gray * torch.tensor([1.0, -1.0])
    assert codec.encode(columns).latent_dist.mode().flatten().abs().argmax() == 1


def test_frames_are_encoded_as_the_video_autoencoder_would() -> None:
    codec = HaarVideoCodec()
    video = torch.rand(2, 3, 3, 8, 6)
    expected = codec.encode((2 * video - 1).transpose(1, 2)).latent_dist.mode().transpose(1, 2)
    assert torch.equal(codec.encode_frames(video), expected)
    assert expected.shape == (2, 3, 12, 4, 3)


def test_codec_refuses_what_it_cannot_encode() -> None:
    codec = HaarVideoCodec()
    with pytest.raises(ValueError, match="even H"):
        codec.encode(torch.zeros(1, 3, 2, 7, 8))
    with pytest.raises(ValueError, match="decodes"):
        codec.decode(torch.zeros(1, 4, 2, 8, 8))
    with pytest.raises(ValueError, match="12 channels"):
        HaarVideoCodec(latent_channels=4)


def test_every_word_of_the_world_is_known() -> None:
    known = set(world_vocabulary())
    lengths = []
    for seed in range(300):
        words = describe(draw_scene(seed, 8, 1.0)).split()
        assert set(words) <= known
        lengths.append(len(words))
    assert sum(length < TEXT_TOKENS for length in lengths) / len(lengths) > 0.75


def test_unknown_words_have_a_place_of_their_own_and_case_does_not_matter() -> None:
    tokenizer = WordTokenizer()
    ids = tokenizer("A striped disc, moves LEFT over gravel").input_ids
    assert ids[:5] == tokenizer("a striped disc moves left").input_ids[:5]
    assert ids[-2] >= len(tokenizer.words)
    assert tokenizer.decode(ids[-2:-1]) == "gravel"
    assert WordTokenizer().decode(ids[-2:-1]).startswith("<unknown ")
    assert ids[-2] == tokenizer("gravel").input_ids[0]
    assert tokenizer("gravel").input_ids[0] != tokenizer("asphalt").input_ids[0]
    assert tokenizer("").input_ids == [1]
    assert max(tokenizer("zebra quagga okapi").input_ids) < tokenizer.vocab_size


def test_unknown_words_are_named_once() -> None:
    tokenizer = WordTokenizer()
    with pytest.warns(UserWarning, match="does not know 'dog', 'meadow': it has seen no video of that. It knows disc"):
        tokenizer("a dog moves over a meadow, a dog")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer(["a dog", "a red disc moves left over grass", ""])
    with pytest.warns(UserWarning, match="does not know 'cat':"):
        tokenizer("a cat and a dog")
    with pytest.warns(
        UserWarning, match=r"does not know 'x{30}\.\.\.', 'w0', .*'w6' and 33 more words: it has"
    ) as said:
        tokenizer(" ".join(["x" * 300, *(f"w{number}" for number in range(40))]))
    assert len(str(said[0].message)) < 400


def test_encoder_is_deterministic_and_tells_subjects_apart() -> None:
    tokenizer = WordTokenizer()
    first, second = (WordEncoder(tokenizer.vocab_size), WordEncoder(tokenizer.vocab_size))
    ids = tokenizer(["red disc moves left", "blue disc moves left"], return_tensors="pt").input_ids
    embedded = first(ids)[0]
    torch.testing.assert_close(embedded, second(ids)[0], atol=0, rtol=0)
    # The same word at the same place differs after another subject: the memory of the words before it.
    assert (embedded[0, 3] - embedded[1, 3]).norm() > 0.1
    padded = tokenizer("red disc", padding="max_length", max_length=6, return_tensors="pt").input_ids
    assert first(padded)[0][0, 3:].abs().max() == 0
    with pytest.raises(ValueError, match="at most"):
        first(torch.ones(1, 99, dtype=torch.int64))


def test_tokenizer_saves_and_loads(tmp_path: pathlib.Path) -> None:
    tokenizer = WordTokenizer(hash_buckets=99)
    tokenizer.save_pretrained(str(tmp_path))
    loaded = WordTokenizer.from_pretrained(str(tmp_path))
    assert loaded.vocab_size == tokenizer.vocab_size
    text = "two unheard of words and a disc"
    assert loaded(text).input_ids == tokenizer(text).input_ids


def test_long_prompts_are_cut_not_refused() -> None:
    pipe = build_pipeline(build_transformer(layers=1, heads=2, head_dim=16))
    embedded = pipe.encode_prompt(" ".join(["disc"] * 60), do_classifier_free_guidance=True)
    assert embedded[0].shape == embedded[1].shape == (1, TEXT_TOKENS, 64)


def test_photographs_of_the_world_are_a_known_word(recwarn: pytest.WarningsRecorder) -> None:
    WordTokenizer()("a red disc moves left over photograph")
    assert not recwarn.list
