import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoVideoProcessor, CLIPImageProcessorPil
from transformers.video_utils import VideoMetadata

from bt_adapter_hf.models.video_backends import available_video_backends
from bt_adapter_hf.models.video_errors import (
    EmptyVideoError,
    NoVideoStreamError,
    TruncatedVideoError,
    VideoError,
    VideoInputError,
    VideoNotFoundError,
)
from bt_adapter_hf.models.video_io import load_video, sample_frame_indices
from bt_adapter_hf.models.video_processing_bt_adapter import BTAdapterVideoProcessor
from tests.clip_tools import numbered_picture, read_numbers, write_clip, write_gif
from tests.models.test_video_io import CLIPS


@pytest.fixture(scope="module")
def numbers_processor():
    """Leaves the pixels alone, so that the numbers of the frames can be read in the output."""
    return BTAdapterVideoProcessor(num_frames=5, do_resize=False, do_center_crop=False, do_normalize=False)


@pytest.fixture(scope="module")
def small_processor():
    return BTAdapterVideoProcessor(num_frames=4, size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})


def shown_numbers(pixels: torch.Tensor) -> list[int]:
    return read_numbers((pixels.permute(0, 2, 3, 1).numpy() * 255).round())


def numbered_clip(count: int) -> np.ndarray:
    return np.stack([numbered_picture(number) for number in range(count)])


@pytest.mark.parametrize("sizes", [(224, 224), (256, 224)])
def test_pixels_equal_per_frame_clip_preprocessing(sizes):
    shortest_edge, side = sizes
    options = {"size": {"shortest_edge": shortest_edge}, "crop_size": {"height": side, "width": side}}
    path = CLIPS / "decord_video_0.mov"
    frames, _ = load_video(path, num_frames=3)
    expected = CLIPImageProcessorPil(**options)([Image.fromarray(frame) for frame in frames], return_tensors="pt")
    found = BTAdapterVideoProcessor(num_frames=3, **options)(path, return_tensors="pt").pixel_values_videos
    assert found.shape == (1, 3, 3, side, side) and found.dtype == torch.float32
    one_step = 1 / 255 / 0.26  # of an 8-bit value, after normalisation
    difference = (found[0] - expected.pixel_values).abs()
    assert difference.max() < 2.1 * one_step
    assert difference.mean() < 0.01 * one_step


def test_default_sampling_is_the_released_test_rule(numbers_processor, tmp_path):
    path = write_clip(tmp_path / "clip.mp4", 40)
    output = numbers_processor(path, return_tensors="pt", return_metadata=True)
    expected = sample_frame_indices(40, 5).tolist()
    assert shown_numbers(output.pixel_values_videos[0]) == expected
    (metadata,) = output.video_metadata
    assert metadata.frames_indices == expected
    assert metadata.timestamps == pytest.approx([index / 10 for index in expected])
    assert "frame_mask" not in output


def test_sampling_can_be_chosen_per_call(numbers_processor, tmp_path):
    path = write_clip(tmp_path / "clip.mp4", 40)

    def numbers(**options):
        return shown_numbers(numbers_processor(path, return_tensors="pt", **options).pixel_values_videos[0])

    assert numbers(sampling="centers", num_frames=7) == sample_frame_indices(40, 7, "centers").tolist()
    assert numbers(sampling="jitter", seed=3) == numbers(sampling="jitter", seed=3)
    assert len({tuple(numbers(sampling="jitter")) for _ in range(5)}) > 1
    np.random.seed(5)
    first = numbers(sampling="jitter")
    np.random.seed(5)
    assert numbers(sampling="jitter") == first
    assert numbers(num_frames=None) == numbers()  # None is the saved value


def test_mixed_sources_and_sizes_in_one_batch(small_processor, tmp_path):
    videos = [
        str(write_clip(tmp_path / "clip.webm", 20, "libvpx-vp9")),
        write_gif(tmp_path / "clip.gif", 7),
        (CLIPS / "decord_video_90.mov").read_bytes(),
        open(CLIPS / "idx.mkv", "rb"),
        np.zeros((9, 40, 30, 3), np.uint8),
        torch.zeros(9, 3, 30, 50),
        [Image.new("RGB", (50, 30))] * 9,
        [str(tmp_path / "frame.png")] * 2,
    ]
    Image.new("RGB", (33, 60)).save(tmp_path / "frame.png")
    with videos[3]:
        output = small_processor(videos, return_tensors="pt", return_metadata=True)
    assert output.pixel_values_videos.shape == (8, 4, 3, 24, 24)
    assert "frame_mask" not in output
    assert [metadata.total_num_frames for metadata in output.video_metadata] == [20, 7, 3, 200, 9, 9, 9, 2]
    for index in (0, 1, 4, 5, 6, 7):
        alone = small_processor(videos[index], return_tensors="pt").pixel_values_videos
        assert torch.equal(alone[0], output.pixel_values_videos[index])


def test_nesting(small_processor):
    clip = np.random.default_rng(0).integers(0, 256, (6, 30, 40, 3), dtype=np.uint8)
    path = str(CLIPS / "idx.mp4")

    def count(videos):
        return len(small_processor(videos, return_tensors="pt").pixel_values_videos)

    assert count(clip) == count([clip]) == count([[clip]]) == count(path) == count([path]) == count([[path]]) == 1
    assert (
        count([clip, path]) == count([[clip], [path]]) == count([[clip, path]]) == count(np.stack([clip, clip])) == 2
    )
    assert count(list(clip)) == 1  # a list of frames is one video
    assert count([list(clip), list(clip), path]) == 3
    assert count(Image.fromarray(clip[0])) == count(clip[0]) == 1  # one frame


def test_frames_that_are_already_sampled_are_used_as_they_are(numbers_processor):
    clip = numbered_clip(5)
    assert sample_frame_indices(5, 5).tolist() != [0, 1, 2, 3, 4]  # so it matters
    for video in (clip, torch.from_numpy(clip), list(clip), [Image.fromarray(frame) for frame in clip]):
        output = numbers_processor([video], return_tensors="pt", return_metadata=True)
        assert shown_numbers(output.pixel_values_videos[0]) == [0, 1, 2, 3, 4]
        assert output.video_metadata[0].frames_indices == [0, 1, 2, 3, 4]
    longer = numbers_processor(numbered_clip(6), return_tensors="pt").pixel_values_videos
    assert shown_numbers(longer[0]) == sample_frame_indices(6, 5).tolist()


def test_videos_of_different_length_are_padded_with_a_mask(numbers_processor, tmp_path):
    path = write_clip(tmp_path / "clip.mp4", 3)
    videos = [numbered_clip(2), path, numbered_clip(4)]
    output = numbers_processor(videos, do_sample_frames=False, return_tensors="pt")
    pixels, mask = output.pixel_values_videos, output.frame_mask
    assert pixels.shape == (3, 4, 3, 64, 64)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[True, True, False, False], [True, True, True, False], [True] * 4]
    assert (pixels[~mask] == 0).all()
    assert [shown_numbers(pixels[i][mask[i]]) for i in range(3)] == [[0, 1], [0, 1, 2], [0, 1, 2, 3]]
    arrays = numbers_processor(videos, do_sample_frames=False, return_tensors="np")
    assert isinstance(arrays.frame_mask, np.ndarray) and arrays.pixel_values_videos.shape == (3, 4, 3, 64, 64)


def test_padding_is_zero_after_normalisation(small_processor):
    videos = [np.zeros((1, 30, 30, 3), np.uint8), np.zeros((2, 30, 30, 3), np.uint8)]
    pixels = small_processor(videos, do_sample_frames=False, return_tensors="pt").pixel_values_videos
    assert (pixels[0, 1] == 0).all() and (pixels[1, 1] < -1).all()


def test_without_return_tensors_a_list_comes_back(numbers_processor):
    output = numbers_processor([numbered_clip(5), np.zeros((5, 10, 20, 3), np.uint8)])
    assert [tuple(video.shape) for video in output.pixel_values_videos] == [(5, 3, 64, 64), (5, 3, 10, 20)]


def test_sizes_that_cannot_be_stacked_are_named(numbers_processor):
    with pytest.raises(ValueError, match=r"\[\(10, 20\), \(64, 64\)\].*do_resize=True"):
        numbers_processor([numbered_clip(5), np.zeros((5, 10, 20, 3), np.uint8)], return_tensors="pt")


def test_metadata_of_frames_decoded_elsewhere_is_kept(numbers_processor):
    clip = numbered_clip(10)
    known = VideoMetadata(total_num_frames=100, fps=20.0, frames_indices=list(range(0, 100, 10)))
    output = numbers_processor([clip], video_metadata=[known], return_tensors="pt", return_metadata=True)
    used = sample_frame_indices(10, 5)
    assert output.video_metadata[0].frames_indices == (10 * used).tolist()
    assert output.video_metadata[0].timestamps == pytest.approx(10 * used / 20.0)
    assert output.video_metadata[0].total_num_frames == 100
    with pytest.raises(ValueError, match="2 videos but 1 entries"):
        numbers_processor([clip, clip], video_metadata=[known])
    with pytest.raises(ValueError, match="10 frames_indices for a video of 7 frames"):
        numbers_processor([clip[:7]], video_metadata=[known])


@pytest.mark.parametrize(
    ("broken", "error", "message"),
    [
        (CLIPS / "audio_only.mp4", NoVideoStreamError, r"^videos\[1\]: .*audio_only.mp4 has no video stream"),
        (CLIPS / "decord_corrupted.mp4", TruncatedVideoError, r"^videos\[1\]: .*28 frames are readable"),
        ("no such file.mp4", VideoNotFoundError, r"^videos\[1\]: no such file.mp4 does not exist"),
        (np.full((5, 8, 8, 3), np.nan), VideoInputError, r"^videos\[1\]: .*NaN"),
    ],
)
def test_a_broken_video_is_named(small_processor, broken, error, message):
    with pytest.raises(error, match=message):
        small_processor([CLIPS / "idx.mp4", broken], return_tensors="pt")
    with pytest.raises(error, match="^(?!videos)"):
        small_processor(broken, return_tensors="pt")


@pytest.mark.parametrize("videos", [[], [[]], [CLIPS / "idx.mp4", []]])
def test_empty_lists(small_processor, videos):
    with pytest.raises(EmptyVideoError, match="empty list"):
        small_processor(videos)


def test_salvage_is_an_option(small_processor):
    output = small_processor(CLIPS / "decord_corrupted.mp4", on_damage="salvage", return_metadata=True)
    assert output.video_metadata[0].total_num_frames == 28


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"num_frames": 0}, "`num_frames` must be an integer of at least 1, got 0"),
        ({"num_frames": "8"}, "`num_frames` must be an integer of at least 1, got '8'"),
        ({"sampling": "random"}, "`sampling` must be one of"),
        ({"video_backend": "opencv"}, "`video_backend` must be one of"),
        ({"on_damage": "skip"}, "`on_damage` must be one of"),
        ({"fps": 2}, "set `num_frames` instead of `fps`"),
    ],
)
def test_wrong_options_die_at_once(small_processor, option, message):
    with pytest.raises(ValueError, match=message):
        BTAdapterVideoProcessor(**option)
    with pytest.raises(ValueError, match=message):
        small_processor(CLIPS / "idx.mp4", **option)


def test_options_of_a_wrong_type_are_value_errors(small_processor):
    with pytest.raises(ValueError, match="field 'size'"):
        small_processor(CLIPS / "idx.mp4", size="large")


def test_round_trip(tmp_path):
    processor = BTAdapterVideoProcessor(
        num_frames=12,
        sampling="centers",
        video_backend="decord",
        on_damage="raise",
        background=(0, 10, 20),
        size={"shortest_edge": 40},
        crop_size={"height": 32, "width": 32},
        image_mean=[0.5, 0.5, 0.5],
    )
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "video_preprocessor_config.json").is_file()
    for loaded in (BTAdapterVideoProcessor.from_pretrained(tmp_path), AutoVideoProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is BTAdapterVideoProcessor
        assert loaded.to_dict() == processor.to_dict()
        assert (loaded.num_frames, loaded.sampling, loaded.video_backend) == (12, "centers", "decord")
    assert AutoVideoProcessor.from_pretrained(tmp_path, num_frames=3).num_frames == 3


@pytest.mark.parametrize("kind", ["numpy", "torch", "bfloat16", "list of arrays", "channels first"])
@pytest.mark.parametrize("options", [{}, {"do_normalize": False}, {"do_resize": False, "do_center_crop": False}])
def test_numbers_that_a_caller_has_scaled_stay_as_scaled(kind, options):
    # away from 0 and 255, where the resize of uint8 cuts off what bicubic adds
    pixels = np.random.default_rng(0).integers(80, 176, (8, 40, 40, 3), dtype=np.uint8)
    scaled = (pixels / 255).astype(np.float32)
    scaled = {
        "numpy": scaled,
        "torch": torch.from_numpy(scaled),
        "bfloat16": torch.from_numpy(scaled).to(torch.bfloat16),
        "list of arrays": list(scaled),
        "channels first": scaled.transpose(0, 3, 1, 2),
    }[kind]
    processor = BTAdapterVideoProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    expected = processor(pixels, return_tensors="pt", **options)["pixel_values_videos"]
    found = processor(scaled, do_rescale=False, return_tensors="pt", **options)["pixel_values_videos"]
    assert (found - expected).abs().max() < (0.04 if kind == "bfloat16" else 0.02)  # uint8 rounds, twice in a resize


@pytest.mark.parametrize("low_high", [(0, 1), (-1, 1), (0, 255), (-2.5, 3)])
def test_floats_are_neither_scaled_nor_rounded_without_rescaling(low_high):
    scaled = np.random.default_rng(0).uniform(*low_high, (2, 32, 32, 3)).astype(np.float32)
    processor = BTAdapterVideoProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_rescale=False, do_normalize=False
    )
    found = processor(scaled, num_frames=2, return_tensors="pt")["pixel_values_videos"]
    assert torch.equal(found[0], torch.from_numpy(scaled).permute(0, 3, 1, 2))
    half = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    smaller = processor(scaled, num_frames=2, return_tensors="pt", **half)["pixel_values_videos"]
    if low_high[0] == 0:
        assert smaller.min() >= 0 and smaller.max() <= low_high[1]


def test_bytes_of_images_and_uint8_without_rescaling_keep_0_to_255():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    processor = BTAdapterVideoProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_rescale=False, do_normalize=False
    )
    for video in (pixels, pixels.astype(np.int64), [Image.fromarray(frame) for frame in pixels]):
        found = processor([video], num_frames=2, return_tensors="pt")["pixel_values_videos"][0]
        assert torch.equal(found.to(torch.uint8), torch.from_numpy(pixels).permute(0, 3, 1, 2))


@pytest.mark.parametrize("how", ["alone", "in a list", "two videos", "open"])
@pytest.mark.parametrize("num_frames", [1, 4, 6])
def test_an_animated_image_is_a_video(tmp_path, how, num_frames):
    frames = [Image.fromarray(np.full((32, 32, 3), 40 * t, np.uint8)) for t in range(6)]
    path = str(tmp_path / "a.png")
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    given = {"alone": path, "in a list": [path], "two videos": [[path], [path]], "open": Image.open(path)}[how]
    processor = BTAdapterVideoProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_rescale=False, do_normalize=False
    )
    found = processor(given, num_frames=num_frames, return_tensors="pt")["pixel_values_videos"]
    assert found.shape[:2] == (2 if how == "two videos" else 1, num_frames)
    expected = load_video(path, num_frames=num_frames)[1].frames_indices
    assert found[0, :, 0, 0, 0].tolist() == [40 * index for index in expected]


def test_the_numbers_are_transformers_own():
    """Normalised in one pass from uint8: bit for bit what `rescale_and_normalize` makes of the same pixels."""
    processor = BTAdapterVideoProcessor(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16})
    frames = np.random.default_rng(0).integers(0, 256, (8, 24, 30, 3), dtype=np.uint8)
    found = processor(frames, return_tensors="pt")["pixel_values_videos"][0]
    pixels = processor(frames, do_normalize=False, do_rescale=False, return_tensors="pt")["pixel_values_videos"][0]
    assert pixels.dtype == torch.uint8 and found.is_contiguous()
    rules = (True, processor.rescale_factor, True, tuple(processor.image_mean), tuple(processor.image_std))
    assert torch.equal(found, processor.rescale_and_normalize(pixels, *rules))


@pytest.mark.parametrize("backend", ["pyav", "decord", "torchcodec"])
@pytest.mark.parametrize("name", ["upright", "rotated", "animated"])
def test_frames_shrink_as_they_are_decoded_to_the_same_numbers(tmp_path, name, backend):
    if available_video_backends()[backend] is not None:
        pytest.skip(f"no {backend}")
    if name == "animated":
        path = write_gif(tmp_path / "a.gif")
    else:
        pictures = [np.tile(numbered_picture(number), (2, 1, 1)) for number in range(30)]
        quarter = (0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30) if name == "rotated" else None
        path = write_clip(tmp_path / "a.mp4", pictures=pictures, matrix=quarter)
    options = {"num_frames": 5, "video_backend": backend, "return_tensors": "pt"}
    processor = BTAdapterVideoProcessor(size={"shortest_edge": 28}, crop_size={"height": 24, "width": 20})
    frames, metadata = load_video(path, num_frames=5, backend=backend)
    found = processor(path, return_metadata=True, **options)
    assert torch.equal(found["pixel_values_videos"], processor(frames, **options)["pixel_values_videos"])
    assert found["video_metadata"] == [metadata]  # the size of the video, and not of what is left of it
    shrunk, _ = load_video(path, num_frames=5, backend=backend, shrink=processor.shrinker())
    assert shrunk.shape == (5, 24, 20, 3) and shrunk.dtype == np.uint8
    rest = processor(shrunk, do_resize=False, do_center_crop=False, **options)
    assert torch.equal(found["pixel_values_videos"], rest["pixel_values_videos"])


def test_few_frames_are_in_memory_at_full_size(tmp_path):
    pictures = [np.full((720, 960, 3), 10 * number, np.uint8) for number in range(24)]
    path = write_clip(tmp_path / "a.mp4", pictures=pictures)
    processor = BTAdapterVideoProcessor(
        num_frames=24, size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}
    )
    processor(path, return_tensors="pt")
    tracemalloc.start()
    processor(path, return_tensors="pt")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * 960 * 720 * 3  # of 24; numpy's arrays are counted, and FFmpeg's pictures are not


def test_a_size_that_cannot_be_used_is_no_fault_of_the_video(small_processor, tmp_path):
    for path in (write_clip(tmp_path / "a.mp4", 10), write_gif(tmp_path / "a.gif")):
        with pytest.raises(ValueError, match="Size must contain") as caught:
            small_processor(path, size={"longest_edge": 24})
        assert not isinstance(caught.value, VideoError)


def test_frames_that_cannot_be_written_to_are_shrunk_without_a_warning(recwarn):
    frame = np.zeros((40, 60, 3), np.uint8)
    frame.setflags(write=False)  # as numpy shows a picture of PIL
    BTAdapterVideoProcessor().shrinker()(frame)
    assert not [warning for warning in recwarn if "writable" in str(warning.message)]
