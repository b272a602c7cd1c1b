import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPModel, CLIPProcessor

from bt_adapter_hf import BTAdapterModel, get_bt_adapter_model, load_bt_adapter, save_bt_adapter
from bt_adapter_hf.adapters.files import AdapterConfig
from bt_adapter_hf.models.video_errors import EmptyVideoError, VideoDecodeError
from bt_adapter_hf.search.encoding import VideoEncoder
from bt_adapter_hf.search.files import find_videos
from tests import tiny_pairs


@pytest.fixture(scope="module")
def encoder(tiny_checkpoint) -> VideoEncoder:
    return VideoEncoder.from_pretrained(tiny_checkpoint, device="cpu")


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 1), (4, 3), (100, 2)])
def test_videos_are_encoded_in_order_whatever_the_batches(encoder, clips, batch_size, workers):
    paths = find_videos([clips])
    encoded = list(encoder.encode_videos(paths, batch_size=batch_size, workers=workers))
    assert [video.path for video in encoded] == paths
    for video in encoded:
        name = os.path.basename(video.path)
        if name in ("empty.mp4", "garbage.avi"):
            assert video.feature is None
            assert isinstance(video.error, EmptyVideoError if name == "empty.mp4" else VideoDecodeError)
            assert name in str(video.error)
            continue
        inputs = encoder.processor(videos=[video.path], return_tensors="pt")
        with torch.no_grad():
            expected = encoder.model.get_video_features(**inputs).pooler_output[0]
        assert video.error is None
        assert video.feature.dtype == np.float32
        np.testing.assert_allclose(video.feature, (expected / expected.norm()).numpy(), atol=1e-6)


def test_facts_of_a_video(encoder, clips):
    (video,) = encoder.encode_videos([str(clips / "red.mp4")])
    assert video.facts["width"] == video.facts["height"] == 32
    assert video.facts["total_num_frames"] == 6
    assert video.facts["fps"] == pytest.approx(10)
    assert video.facts["duration"] == pytest.approx(0.6, abs=0.11)
    assert video.facts["timestamps"] == [0.0, 0.1, 0.2, 0.4]  # the released test rule: round(5/4 * i) of 6 frames


def test_videos_of_unequal_length_are_masked(tiny_checkpoint, clips, tmp_path):
    encoder = VideoEncoder.from_pretrained(tiny_checkpoint, device="cpu")
    encoder.processor.video_processor.do_sample_frames = False  # all frames: six here, nine and two there
    tiny_pairs.write_clip(tmp_path / "long.mp4", (200, 200, 40), step=1, frames=9)
    tiny_pairs.write_clip(tmp_path / "short.mp4", (40, 200, 200), step=1, frames=2)
    paths = [str(clips / "red.mp4"), str(tmp_path / "long.mp4"), str(tmp_path / "short.mp4")]
    together = [video.feature for video in encoder.encode_videos(paths, batch_size=3)]
    alone = [next(iter(encoder.encode_videos([path]))).feature for path in paths]
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_an_error_of_the_program_is_not_taken_for_a_bad_file(encoder, clips, monkeypatch):
    monkeypatch.setattr(encoder.model, "get_video_features", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(encoder.encode_videos([str(clips / "red.mp4")]))


def test_texts(encoder):
    texts = ["a red dog", "b", "a green dog runs"]
    features = encoder.encode_texts(texts, batch_size=2)
    assert features.shape == (3, 12)
    assert features.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-6)
    for text, feature in zip(texts, features, strict=True):
        np.testing.assert_allclose(encoder.encode_texts([text])[0], feature, atol=1e-6)


def test_bad_texts(encoder):
    with pytest.raises(ValueError, match=r"'a very long.*' is \d+ tokens long; this model takes 24"):
        encoder.encode_texts(["fine", "a very long text about nothing in particular at all"])
    with pytest.raises(ValueError, match="a text is empty"):
        encoder.encode_texts(["fine", "  "])
    with pytest.raises(ValueError, match=r"the text 'a \\ud800' holds \\ud800, which is no character"):
        encoder.encode_texts(["fine", "a \ud800"])


def test_label_scores_are_the_models_softmax(encoder, clips):
    labels = ["red", "green", "blue"]
    (video,) = encoder.encode_videos([str(clips / "red.mp4")])
    scores = encoder.label_scores(video.feature, encoder.encode_texts(labels))
    inputs = encoder.processor(videos=[video.path], text=labels, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = encoder.model(**inputs).logits_per_video[0]
    probabilities = logits.softmax(-1)
    assert [i for i, _, _ in scores] == logits.argsort(descending=True).tolist()
    for i, probability, cosine in scores:
        assert probability == pytest.approx(probabilities[i].item(), abs=1e-5)
        assert cosine == pytest.approx((logits[i] / encoder.model.logit_scale.exp()).item(), abs=1e-5)


def test_fingerprint_tells_models_apart(tiny_checkpoint, encoder, tmp_path):
    original = encoder.fingerprint()
    assert VideoEncoder.from_pretrained(tiny_checkpoint, device="cpu", num_frames=2).fingerprint() == original

    model = BTAdapterModel.from_pretrained(tiny_checkpoint)
    with torch.no_grad():
        model.vision_model.bt_adapter.video_cls += 1e-3
    assert VideoEncoder(model, encoder.processor, None).fingerprint() != original
    assert VideoEncoder.from_pretrained(tiny_checkpoint, device="cpu", dtype="bfloat16").fingerprint() != original
    model = BTAdapterModel.from_pretrained(tiny_checkpoint, pooling_order="mean_then_norm")
    assert VideoEncoder(model, encoder.processor, None).fingerprint() != original

    encoder.model.save_pretrained(tmp_path)
    assert VideoEncoder(BTAdapterModel.from_pretrained(tmp_path), encoder.processor, None).fingerprint() == original


def test_fingerprint_tells_dtypes_apart(tiny_checkpoint):
    """Also where the bytes are the same: a zero is a zero in each."""
    fingerprints = set()
    for dtype in ("float16", "bfloat16"):
        encoder = VideoEncoder.from_pretrained(tiny_checkpoint, device="cpu", dtype=dtype)
        for tensor in encoder.model.state_dict().values():
            tensor.zero_()
        fingerprints.add(encoder.fingerprint())
    assert len(fingerprints) == 2


def test_a_model_without_a_trained_branch_is_refused(tmp_path):
    CLIPModel(tiny_pairs.clip_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a model of type 'clip'; expected 'bt_adapter'"):
        VideoEncoder.from_pretrained(tmp_path)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """Folder of an adapter of a CLIP, which lies with its processor in a folder beside it."""
    base, folder = tmp_path_factory.mktemp("clip"), tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    clip = CLIPModel(tiny_pairs.clip_config())
    clip.save_pretrained(base)
    processor = tiny_pairs.processor()
    CLIPProcessor(processor.image_processor, processor.tokenizer).save_pretrained(base)
    model = get_bt_adapter_model(clip, 2)
    for parameter in model.vision_model.bt_adapter.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    save_bt_adapter(model, folder, base_model_name_or_path=str(base))
    return folder


def test_an_adapter_says_how_many_frames(adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "trained")
    config = json.loads((folder / "bt_adapter_config.json").read_text())
    config["branch"]["num_trained_frames"] = 5
    (folder / "bt_adapter_config.json").write_text(json.dumps(config))
    assert VideoEncoder.from_pretrained(folder, device="cpu").settings["num_frames"] == 5
    assert VideoEncoder.from_pretrained(folder, device="cpu", num_frames=3).settings["num_frames"] == 3


def test_an_adapter_comes_with_its_base_model(adapter, clips):
    encoder = VideoEncoder.from_pretrained(adapter, device="cpu", num_frames=4)
    (video,) = encoder.encode_videos([str(clips / "red.mp4")])
    inputs = tiny_pairs.processor()(videos=[str(clips / "red.mp4")], return_tensors="pt")
    base = AdapterConfig.read(adapter).base_model_name_or_path
    model = load_bt_adapter(CLIPModel.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        expected = model.get_video_features(**inputs).pooler_output[0]
    np.testing.assert_allclose(video.feature, (expected / expected.norm()).numpy(), atol=1e-6)
    assert encoder.encode_texts(["a red dog"]).shape == (1, 12)


def test_what_is_no_dual_encoder_is_named(adapter, tmp_path):
    config = json.loads((adapter / "bt_adapter_config.json").read_text())
    shutil.copytree(adapter, tmp_path / "chat")
    (tmp_path / "chat" / "bt_adapter_config.json").write_text(json.dumps({**config, "model_type": "bt_adapter_llava"}))
    with pytest.raises(ValueError, match="chat' holds an adapter of a model of type 'bt_adapter_llava'; expected"):
        VideoEncoder.from_pretrained(tmp_path / "chat")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty' holds no file at all; expected 'bt_adapter', a dual encoder"):
        VideoEncoder.from_pretrained(tmp_path / "empty")
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="empty' holds LoRA of peft without a branch"):
        VideoEncoder.from_pretrained(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{")
    with pytest.raises((ValueError, OSError), match="config.json"):
        VideoEncoder.from_pretrained(tmp_path / "empty")


def test_bad_options(tiny_checkpoint, encoder, tmp_path):
    with pytest.raises(ValueError, match="num_frames=0"):
        VideoEncoder.from_pretrained(tiny_checkpoint, num_frames=0)
    for device in ("meta", "hpu"):
        with pytest.raises(ValueError, match=f"device '{device}' cannot be used"):
            VideoEncoder.from_pretrained(tiny_checkpoint, device=device)
    with pytest.raises(ValueError, match="device 'abacus' cannot be used"):
        VideoEncoder.from_pretrained(tiny_checkpoint, device="abacus")
    with pytest.raises(FileNotFoundError, match="there is no folder '.*nowhere'"):
        VideoEncoder.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(NotADirectoryError, match="model.safetensors' is a file; expected a folder"):
        VideoEncoder.from_pretrained(tiny_checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match="batch_size=0"):
        next(encoder.encode_videos(["x.mp4"], batch_size=0))
    with pytest.raises(ValueError, match="workers=0"):
        next(encoder.encode_videos(["x.mp4"], workers=0))


def test_what_a_model_that_gives_nan_says(tiny_checkpoint, clips):
    """Of a video its own failure, of a text an error."""
    encoder = VideoEncoder.from_pretrained(tiny_checkpoint, device="cpu")
    with torch.no_grad():
        encoder.model.visual_projection.weight[0, 0] = float("nan")
        encoder.model.text_projection.weight[0, 0] = float("nan")
    (video,) = encoder.encode_videos([str(clips / "red.mp4")])
    assert video.feature is None
    assert re.search(r"feature of '.*red\.mp4' is not finite: try --dtype float32", str(video.error))
    with pytest.raises(ValueError, match="feature of 'a red dog' is not finite"):
        encoder.encode_texts(["a red dog"])
