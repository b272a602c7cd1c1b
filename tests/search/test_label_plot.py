import numpy as np
import pytest
import torch
from PIL import Image

from bt_adapter_hf import VideoError
from bt_adapter_hf.cli.main import main
from bt_adapter_hf.search.encoding import VideoEncoder
from bt_adapter_hf.search.label_plot import LabelledClip, both_ways, draw_label_plot, label_both_ways
from tests import clip_tools


@pytest.fixture(scope="module")
def encoder(tiny_checkpoint):
    return VideoEncoder.from_pretrained(tiny_checkpoint, device="cpu")


@pytest.fixture
def clip(tmp_path):
    return clip_tools.write_clip(tmp_path / "clip.mp4", count=12)


def test_both_ways(encoder, clip, tmp_path):
    """The first is the feature that a search has; the second that of the frames in the opposite order."""
    forward, backward = both_ways(encoder, clip)
    (video,) = encoder.encode_videos([str(clip)])
    np.testing.assert_allclose(forward, video.feature, atol=1e-5)
    frames = encoder.processor(videos=[str(clip)], return_tensors="pt")["pixel_values_videos"].flip(1)
    with torch.no_grad():
        expected = encoder.model.get_video_features(frames).pooler_output[0]
    np.testing.assert_allclose(backward, expected / expected.norm(), atol=1e-5)
    (tmp_path / "no.mp4").write_text("words")
    with pytest.raises(VideoError, match="no.mp4"):
        both_ways(encoder, tmp_path / "no.mp4")


def test_labels_are_those_of_classify(encoder, clip):
    labels = ["a red square", "the left", "a blue square"]
    texts = encoder.encode_texts(labels)
    found = label_both_ways(encoder, clip, labels, texts)
    (video,) = encoder.encode_videos([str(clip)])
    expected = encoder.label_scores(video.feature, texts)
    assert found.labels == [labels[i] for i, _, _ in expected]
    np.testing.assert_allclose(found.probabilities, [p for _, p, _ in expected], atol=1e-5)
    assert sum(found.reversed_probabilities) == pytest.approx(1, abs=1e-6)
    assert label_both_ways(encoder, clip, labels, texts, top=2).labels == found.labels[:2]


def test_bars_are_as_long_as_they_say():
    picture = draw_label_plot([LabelledClip("clip.mp4", ["a" * 200, "b"], [0.75, 0.25], [0.1, 0.9])])
    pixels = np.asarray(picture)

    def longest(colour: str) -> int:
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        return int((pixels[:, 468:960] == rgb).all(-1).sum(1).max())

    assert longest("#2f5fd0") == pytest.approx(0.75 * 490, abs=2)
    assert longest("#b8651b") == pytest.approx(0.9 * 490, abs=2)


def test_classify_plot(tiny_checkpoint, clip, tmp_path, capsys):
    argv = ["classify", str(clip), "--labels", "red,blue", "--model", str(tiny_checkpoint)]
    assert main([*argv, "--plot", str(tmp_path / "plot.png"), "--json"]) == 0
    assert capsys.readouterr().out.startswith("{")
    assert Image.open(tmp_path / "plot.png").width == 1120
    assert main([*argv, "--plot", str(tmp_path / "plot.gif")]) == 1
    assert "the plot '" in capsys.readouterr().err and not (tmp_path / "plot.gif").exists()
