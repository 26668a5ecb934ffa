"""The cosine of CLIP, on a tiny model with random weights."""

import json

import numpy as np
import pytest
import torch

from corrdit.motion import PromptSimilarity


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder with a tiny CLIP model, whose words are single letters."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    text = {**sizes, "vocab_size": len(words), "max_position_embeddings": 12, **ends}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=12)
    size = {"shortest_edge": 16}
    CLIPProcessor(CLIPImageProcessor(size=size, crop_size={"height": 16, "width": 16}), tokenizer).save_pretrained(
        folder
    )
    return folder


def test_it_is_the_mean_cosine_of_the_frames(clip):
    from transformers import CLIPModel, CLIPProcessor

    video = np.random.default_rng(0).integers(0, 255, (3, 20, 16, 3), dtype=np.uint8)
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    inputs = processor(text=["a cat"], images=list(video), return_tensors="pt")
    with torch.no_grad():
        expected = (model(**inputs).logits_per_image / model.logit_scale.exp()).mean()
    similarity = PromptSimilarity(clip)
    assert similarity(video, "a cat") == pytest.approx(float(expected), abs=1e-5)
    assert similarity(video, "a dog" * 30) != pytest.approx(float(expected), abs=1e-5)
    with pytest.raises(ValueError, match="uint8"):
        similarity(video / 255, "a cat")


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot load the CLIP model .*give a folder that holds openai"):
        PromptSimilarity(tmp_path / "nothing")
