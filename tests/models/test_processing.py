import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, CLIPImageProcessor, CLIPTokenizer

from bt_adapter_hf.models.processing_bt_adapter import BTAdapterProcessor
from bt_adapter_hf.models.video_errors import EmptyVideoError
from bt_adapter_hf.models.video_io import sample_frame_indices
from bt_adapter_hf.models.video_processing_bt_adapter import BTAdapterVideoProcessor
from tests.models.test_video_io import CLIPS


@pytest.fixture(scope="module")
def processor():
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    sizes = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    return BTAdapterProcessor(
        CLIPImageProcessor(**sizes),
        BTAdapterVideoProcessor(num_frames=3, sampling="centers", **sizes),
        CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[], model_max_length=10),
    )


def test_text_images_and_videos_together(processor):
    images = [np.zeros((30, 40, 3), np.uint8)] * 2
    videos = [CLIPS / "idx.mp4", CLIPS / "one.gif"]
    texts = ["a dog", "red"]
    output = processor(images=images, text=texts, videos=videos, padding=True, return_tensors="pt")
    shapes = {name: tuple(value.shape) for name, value in output.items()}
    assert shapes == {
        "input_ids": (2, 6),
        "attention_mask": (2, 6),
        "pixel_values": (2, 3, 24, 24),
        "pixel_values_videos": (2, 3, 3, 24, 24),
    }
    alone = processor.video_processor(videos, return_tensors="pt").pixel_values_videos
    assert torch.equal(output.pixel_values_videos, alone)
    assert output.input_ids.tolist() == processor.tokenizer(texts, padding=True).input_ids
    assert torch.equal(output.pixel_values, processor.image_processor(images, return_tensors="pt").pixel_values)


def test_video_options_reach_the_video_processor(processor):
    def metadata(**options):
        return processor(videos=CLIPS / "idx.mp4", return_metadata=True, **options).video_metadata[0]

    assert metadata().frames_indices == sample_frame_indices(200, 3, "centers").tolist()
    assert metadata(num_frames=7, sampling="uniform").frames_indices == sample_frame_indices(200, 7).tolist()
    nested = metadata(videos_kwargs={"num_frames": 5})
    assert nested.frames_indices == sample_frame_indices(200, 5, "centers").tolist()
    assert "video_metadata" not in processor(videos=CLIPS / "idx.mp4")


def test_frame_mask_comes_through(processor):
    videos = [np.zeros((2, 30, 30, 3), np.uint8), np.zeros((4, 30, 30, 3), np.uint8)]
    output = processor(videos=videos, do_sample_frames=False, return_tensors="pt")
    assert output.frame_mask.tolist() == [[True, True, False, False], [True] * 4]


@pytest.mark.parametrize(
    ("text", "options", "index"),
    [
        ("much too long", {}, 0),
        (["a", "much too long"], {"padding": True, "return_tensors": "pt"}, 1),
        (["a", "much too long"], {}, 1),
        (["a", "much too long"], {"return_attention_mask": False}, 1),
    ],
)
def test_a_text_over_the_limit_is_an_error(processor, text, options, index):
    with pytest.raises(ValueError, match=f"Text {index} has 13 tokens, the limit is 10: pass `truncation=True`"):
        processor(text=text, **options)
    cut = processor(text=text, truncation=True, **options)
    longest = cut["input_ids"] if isinstance(text, str) else cut["input_ids"][index]
    assert len(longest) == 10 and longest[-1] == processor.tokenizer.eos_token_id


def test_a_text_at_the_limit_is_fine(processor):
    assert len(processor(text="abcdefgh")["input_ids"]) == 10


def test_nothing_and_empty_input(processor):
    with pytest.raises(ValueError, match="at least one input"):
        processor()
    with pytest.raises(EmptyVideoError):
        processor(videos=[])


@pytest.mark.parametrize("loader", [AutoProcessor, BTAdapterProcessor])
def test_round_trip_in_one_directory(processor, tmp_path, loader):
    processor.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    assert type(loaded) is BTAdapterProcessor
    assert loaded.video_processor.to_dict() == processor.video_processor.to_dict()
    inputs = {"text": ["a dog"], "videos": CLIPS / "idx.mp4", "images": np.zeros((30, 40, 3), np.uint8)}
    before, after = (each(**inputs, return_tensors="pt") for each in (processor, loaded))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


_WITHOUT_THE_PACKAGE = """
import sys
sys.modules["bt_adapter_hf"] = None  # importing it fails, as where it is not installed
from transformers import AutoProcessor
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(processor).__module__.startswith("transformers_modules."), type(processor)
pixels = processor(videos=sys.argv[2], text="a dog", return_tensors="pt").pixel_values_videos
print(tuple(pixels.shape), float(pixels.double().sum()))
"""


def test_loads_with_trust_remote_code_where_the_package_is_absent(processor, tmp_path, monkeypatch):
    monkeypatch.setattr(BTAdapterProcessor, "_auto_class", "AutoProcessor")
    monkeypatch.setattr(BTAdapterVideoProcessor, "_auto_class", "AutoVideoProcessor")
    processor.save_pretrained(tmp_path / "saved")
    clip = str(CLIPS / "idx.mp4")
    answer = subprocess.run(
        [sys.executable, "-c", _WITHOUT_THE_PACKAGE, str(tmp_path / "saved"), clip],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert answer.returncode == 0, answer.stderr
    pixels = processor(videos=clip, return_tensors="pt").pixel_values_videos
    assert answer.stdout.split("\n")[0] == f"{tuple(pixels.shape)} {float(pixels.double().sum())}"
