"""Frames are as a player shows them: alpha, pixel shape, bit depth, colours, orientation, animated images; else an
error. And a file is never a way to other files."""

import io
from fractions import Fraction
from importlib.metadata import version

import av
import numpy as np
import pytest
from packaging.version import Version
from PIL import Image, ImageOps, features

from bt_adapter_hf.models.video_backends import available_video_backends
from bt_adapter_hf.models.video_errors import VideoBackendError, VideoDecodeError, VideoError, VideoInputError
from bt_adapter_hf.models.video_io import load_video, sample_frame_indices
from tests.clip_tools import numbered_picture, read_numbers, write_clip


USABLE_BACKENDS = [name for name, problem in available_video_backends().items() if problem is None]
OTHERS = [name for name in USABLE_BACKENDS if name != "pyav"]


def write(path, codec, pix_fmt, pictures, options=None, aspect=None, colours=None):
    """Encode uint8 pictures, or frames, as they are."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options=options or {})
        stream.pix_fmt = pix_fmt
        for number, picture in enumerate(pictures):
            frame = picture
            if isinstance(picture, np.ndarray):
                frame = av.VideoFrame.from_ndarray(picture, format="rgba" if picture.shape[2] == 4 else "rgb24")
            if number == 0:
                stream.width, stream.height = frame.width, frame.height
                if aspect is not None:
                    stream.codec_context.sample_aspect_ratio = aspect
                for name, value in (colours or {}).items():
                    setattr(stream.codec_context, name, value)
            frame.pts, frame.time_base = number, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


# Alpha


@pytest.mark.parametrize(
    ("file", "codec", "pix_fmt", "options"),
    [
        ("vp9.webm", "libvpx-vp9", "yuva420p", {"auto-alt-ref": "0"}),
        ("vp8.webm", "libvpx", "yuva420p", {"auto-alt-ref": "0"}),
        ("prores.mov", "prores_ks", "yuva444p10le", {"profile": "4444"}),
        ("png.mov", "png", "rgba", {}),
        ("qtrle.mov", "qtrle", "argb", {}),
        ("ffv1.mkv", "ffv1", "bgra", {}),
        ("ut.avi", "utvideo", "gbrap", {}),
        ("cfhd.mov", "cfhd", "gbrap12le", {}),
    ],
)
def test_alpha_of_every_codec_is_put_on_the_background(tmp_path, file, codec, pix_fmt, options):
    pictures = []
    for _ in range(4):
        picture = np.zeros((64, 64, 4), np.uint8)
        picture[..., 0] = 200
        picture[:, :32, 3] = 255
        picture[32:, :32, 3] = 128  # half transparent; the right half wholly
        pictures.append(picture)
    path = write(tmp_path / file, codec, pix_fmt, pictures, options)
    frames, metadata = load_video(path, num_frames=None, background=(0, 0, 240))
    assert metadata.total_num_frames == 4
    for place, shown in (((16, 16), (200, 0, 0)), ((48, 16), (100, 0, 120)), ((16, 48), (0, 0, 240))):
        assert np.abs(frames[(slice(None), *place)].astype(int) - shown).max() <= 4, place
    for backend in OTHERS:
        reason = "one or two off" if (backend, file) == ("torchcodec", "ut.avi") else "drops the transparency"
        with pytest.raises(VideoBackendError, match=f"{reason}.*Use backend='pyav'"):
            load_video(path, backend=backend)


# Shape of pixels


@pytest.mark.parametrize("file", ["aspect.mp4", "aspect.mkv", "aspect.avi"])
@pytest.mark.parametrize(
    ("aspect", "size"), [("2/1", (64, 128)), ("4/3", (64, 85)), ("8/9", (72, 64)), ("1/1", (64, 64))]
)
def test_pixels_are_made_square_by_making_one_side_longer(tmp_path, file, aspect, size):
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:, 32:] = 255
    codec = "mpeg4" if file.endswith("avi") else "libx264"
    path = write(tmp_path / file, codec, "yuv420p", [picture] * 3, aspect=Fraction(aspect))
    frames, metadata = load_video(path, num_frames=2)
    height, width = size
    assert frames.shape == (2, *size, 3) and (metadata.height, metadata.width) == size
    assert frames[0, height // 2, width // 2 - 8].max() < 20 and frames[0, height // 2, width // 2 + 8].min() > 235
    for backend in OTHERS if aspect != "1/1" and not file.endswith("avi") else []:
        with pytest.raises(VideoBackendError, match="pixels of the file in their shape"):
            load_video(path, backend=backend)


def test_a_clip_that_changes_the_shape_of_its_pixels_is_an_error(tmp_path):
    pictures = [np.zeros((64, 64, 3), np.uint8)] * 4
    for name, aspect in (("a.h264", "1/1"), ("b.h264", "2/1")):
        write(tmp_path / name, "libx264", "yuv420p", pictures, aspect=Fraction(aspect))
    both = (tmp_path / "a.h264").read_bytes() + (tmp_path / "b.h264").read_bytes()
    with pytest.raises(VideoDecodeError, match="changes the shape of its pixels"):
        load_video(both, num_frames=None)


def test_an_absurd_shape_of_pixels_is_an_error(tmp_path):
    path = write(tmp_path / "a.mov", "libx264", "yuv420p", [np.zeros((64, 64, 3), np.uint8)], aspect=Fraction(30, 1))
    with pytest.raises(VideoDecodeError, match="30 times as wide as high"):
        load_video(path)


# Bit depth and colours

LUMA_WEIGHTS = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 9: (0.2627, 0.0593), 2: (0.299, 0.114)}  # red and blue


def coloured(pix_fmt, space, full) -> av.VideoFrame:
    frame = av.VideoFrame(128, 128, pix_fmt)
    frame.colorspace, frame.color_range = space, 2 if full else 1
    kind, scale = (np.uint16, 4) if "10" in pix_fmt else (np.uint8, 1)
    for plane, value in zip(frame.planes, (90, 110, 190), strict=True):
        content = np.full((plane.height, plane.line_size // kind().itemsize), value * scale, kind)
        plane.update(content.tobytes())
    return frame


def expected_colour(space, full):
    red_weight, blue_weight = LUMA_WEIGHTS[space]
    luma = 90 / 255 if full else (90 - 16) / 219
    blue, red = ((value - 128) / (255 if full else 224) for value in (110, 190))
    red, blue = luma + 2 * (1 - red_weight) * red, luma + 2 * (1 - blue_weight) * blue
    green = (luma - red_weight * red - blue_weight * blue) / (1 - red_weight - blue_weight)
    return np.clip(np.array([red, green, blue]) * 255, 0, 255)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("space", list(LUMA_WEIGHTS))
@pytest.mark.parametrize(
    ("file", "codec", "pix_fmt", "options"),
    [
        ("h264.mp4", "libx264", "yuv420p", {"qp": "0"}),
        ("high10.mkv", "libx264", "yuv420p10le", {"qp": "0"}),
        ("main10.mkv", "libx265", "yuv420p10le", {"x265-params": "lossless=1:log-level=none"}),
        ("vp9.webm", "libvpx-vp9", "yuv420p", {"lossless": "1"}),
        ("av1.mkv", "libsvtav1", "yuv420p10le", {"crf": "4", "preset": "12"}),
    ],
)
def test_matrix_range_and_depth(tmp_path, file, codec, pix_fmt, options, space, full):
    colours = {"colorspace": space, "color_range": 2 if full else 1}
    path = write(
        tmp_path / file, codec, pix_fmt, [coloured(pix_fmt, space, full) for _ in range(2)], options, colours=colours
    )
    for backend in USABLE_BACKENDS:
        try:
            frames, _ = load_video(path, num_frames=1, backend=backend)
        except VideoBackendError as error:
            if backend == "torchcodec":  # older ones show full range as limited, and are refused for it
                assert Version(version("torchcodec")) < Version("0.17") and "as the file asks for" in str(error)
                continue
            assert backend == "decord" and "no AV1 decoder" in str(error)
            continue
        assert frames.dtype == np.uint8
        assert np.abs(frames[0, 32, 32] - expected_colour(space, full)).max() <= 4  # FFmpeg's integer conversion


def test_prores_of_10_bits(tmp_path):
    path = write(tmp_path / "a.mov", "prores_ks", "yuv422p10le", [np.full((64, 64, 3), 77, np.uint8)] * 2)
    assert np.abs(load_video(path)[0].astype(int) - 77).max() <= 2


def test_hdr_is_said(tmp_path, caplog):
    colours = {"color_trc": 16, "colorspace": 9, "color_primaries": 9}
    frames = [coloured("yuv420p10le", 9, False) for _ in range(3)]
    for frame in frames:
        frame.color_trc = 16
    load_video(write(tmp_path / "a.mkv", "libx264", "yuv420p10le", frames, colours=colours))
    assert caplog.text.count("a.mkv is HDR; its colours are shown without tone mapping") == 1


# Orientation inside the frames


@pytest.mark.parametrize("orientation", range(1, 9))
def test_mjpeg_with_exif_in_its_frames(tmp_path, orientation):
    stored = np.zeros((48, 64, 3), np.uint8)
    stored[:16, :16], stored[:16, 16:32] = 255, 90
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "Maker", orientation
    path = tmp_path / "cam.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        stream.codec_context.open()
        for number in range(4):
            content = io.BytesIO()
            Image.fromarray(stored).save(content, "JPEG", exif=exif, quality=95)
            packet = av.Packet(content.getvalue())
            packet.pts = packet.dts = number
            packet.time_base, packet.stream, packet.is_keyframe = Fraction(1, 10), stream, True
            container.mux(packet)
    frames, metadata = load_video(path, num_frames=None)
    content.seek(0)
    with Image.open(content) as image:  # PIL's reading of the tag
        shown = np.asarray(ImageOps.exif_transpose(image))
    assert metadata.total_num_frames == 4 and frames.shape == (4, *shown.shape)
    assert np.abs(frames[0].astype(int) - shown).mean() < 3


# Images through PIL


def moving(path, count=6, **options):
    pictures = [Image.fromarray(numbered_picture(number)) for number in range(count)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], **options)
    return path


ANIMATED = [("a.gif", {}), ("a.png", {}), ("a.tiff", {}), ("a.webp", {"lossless": True})]
if features.check("avif"):
    ANIMATED.append(("a.avif", {"quality": 95}))


@pytest.mark.parametrize(("file", "options"), ANIMATED)
@pytest.mark.parametrize("how", ["path", "bytes", "list of one", "open"])
def test_animated_images_are_videos(tmp_path, file, options, how):
    path = moving(tmp_path / file, **({} if "tiff" in file else {"duration": 250}), **options)
    video = {"path": path, "bytes": path.read_bytes(), "list of one": [path], "open": Image.open(path)}[how]
    if how == "open":
        video.seek(2)
    if how == "list of one":
        with pytest.raises(VideoInputError, match="animation of 6 frames among the frames of a video: give it alone"):
            load_video(video)
        return
    frames, metadata = load_video(video, num_frames=3)
    assert read_numbers(frames) == metadata.frames_indices == sample_frame_indices(6, 3).tolist()
    assert metadata.total_num_frames == 6
    step = 0.1 if "tiff" in file else 0.25
    assert metadata.duration == pytest.approx(6 * step)
    assert metadata.timestamps == pytest.approx([index * step for index in metadata.frames_indices])
    if how == "open":
        assert video.tell() == 2


@pytest.mark.parametrize("file", ["a.png", "a.webp"])
def test_animated_alpha_is_put_on_the_background(tmp_path, file):
    pictures = []
    for number in range(4):
        picture = np.zeros((32, 32, 4), np.uint8)
        picture[..., 0] = 50 * number
        picture[:, :16, 3] = 255
        pictures.append(Image.fromarray(picture))
    path = tmp_path / file
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=100, lossless=True, disposal=1)
    frames, _ = load_video(path, num_frames=None, background=(1, 2, 250))
    assert frames[:, 8, 8].tolist() == [[50 * number, 0, 0] for number in range(4)]
    assert (frames[:, 8, 24] == (1, 2, 250)).all()


def test_the_default_image_of_an_animated_png_is_not_part_of_it(tmp_path):
    moving(tmp_path / "a.png", default_image=True, duration=100)
    frames, metadata = load_video(tmp_path / "a.png", num_frames=None)
    assert read_numbers(frames) == [1, 2, 3, 4, 5] and metadata.total_num_frames == 5


@pytest.mark.parametrize("file", ["a.png", "a.webp"])
def test_cut_animations_raise_or_are_salvaged(tmp_path, file, caplog):
    path = moving(tmp_path / file, duration=100, **({"lossless": True} if file == "a.webp" else {}))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(VideoDecodeError, match=file):
        load_video(path)
    try:
        frames, metadata = load_video(path, on_damage="salvage", num_frames=None)
    except VideoDecodeError:
        assert file == "a.webp"  # whose index says that it is cut: PIL opens none of it
        return
    assert read_numbers(frames) == metadata.frames_indices == list(range(len(frames)))
    assert 0 < len(frames) < 6


def test_stills_are_videos_of_one_frame(tmp_path):
    for file in ("a.png", "a.webp", "a.tiff", "a.bmp", "a.jpg"):
        Image.fromarray(numbered_picture(5)).save(tmp_path / file)
        frames, metadata = load_video(tmp_path / file, num_frames=3)
        assert read_numbers(frames) == [5, 5, 5] and metadata.total_num_frames == 1


def test_grey_of_16_bits_is_not_cut_off_at_255(tmp_path):
    Image.fromarray(np.full((8, 8), 32768, np.uint16)).save(tmp_path / "a.png")
    assert (load_video(tmp_path / "a.png", num_frames=1)[0] == 128).all()
    assert (load_video([tmp_path / "a.png"], num_frames=1)[0] == 128).all()
    with pytest.raises(VideoInputError, match="mode F"):
        load_video([Image.new("F", (8, 8))])


@pytest.mark.parametrize("how", ["path", "open"])
def test_orientation_of_photos(tmp_path, how):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:, :32] = 255
    Image.fromarray(picture).save(tmp_path / "a.jpg", exif=exif)
    frame = tmp_path / "a.jpg" if how == "path" else Image.open(tmp_path / "a.jpg")
    frames, _ = load_video([frame], num_frames=1)
    assert frames.shape == (1, 64, 32, 3) and frames[0, :24].min() > 240 and frames[0, 40:].max() < 15


def test_an_open_animation_among_frames_is_refused(tmp_path):
    with Image.open(moving(tmp_path / "a.gif")) as image:
        with pytest.raises(VideoInputError, match=r"Frame 0 is an animation of 6 frames.*image.copy\(\)"):
            load_video([image, image])
        copies = []
        for number in range(3):
            image.seek(number)
            copies.append(image.copy())
        assert read_numbers(load_video(copies, num_frames=None)[0]) == [0, 1, 2]


def test_what_pil_raises_is_the_error_of_the_item(tmp_path, monkeypatch):
    path = moving(tmp_path / "a.webp")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(VideoDecodeError, match=r"a.webp cannot be read: DecompressionBombError"):
        load_video(path)
    with pytest.raises(VideoDecodeError, match=r"Frame 0, .*a.webp, cannot be read: DecompressionBombError"):
        load_video([path, path])
    monkeypatch.undo()
    with Image.open(moving(tmp_path / "a.gif")) as image:
        pass
    with pytest.raises(VideoError, match=r"a.gif cannot be read"):
        load_video(image)  # its file is closed


def test_postscript_is_not_run(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(VideoDecodeError, match=r"a.png, is PostScript"):
        load_video([tmp_path / "a.png"])


# Other files

DASH = """<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"
mediaPresentationDuration="PT1S" profiles="urn:mpeg:dash:profile:isoff-main:2011"><Period><AdaptationSet
mimeType="video/mp4"><Representation id="1" bandwidth="1"><BaseURL>secret.mp4</BaseURL></Representation>
</AdaptationSet></Period></MPD>"""
SDP = (
    "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n"
)
LISTS = {
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1.0,\n{}\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile {}\n",
    "dash": DASH.replace("secret.mp4", "{}"),
    "sdp": SDP,
}


@pytest.fixture(scope="module")
def secret_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("secrets")
    write_clip(folder / "secret.ts", 10, options={"g": "1"})
    write_clip(folder / "secret.mp4", 10, options={"g": "1"})
    return folder


@pytest.mark.parametrize("name", ["a.mp4", "a.m3u8", "a.mpd", "a.sdp", "a.ffconcat"])
@pytest.mark.parametrize("kind", list(LISTS))
def test_lists_of_other_files_open_none_of_them(secret_folder, monkeypatch, kind, name):
    monkeypatch.chdir(secret_folder)
    if (kind, name) in (("hls", "a.m3u8"), ("concat", "a.mp4")):
        (secret_folder / name).write_text(LISTS[kind].replace("{}", "secret.ts"))
        with av.open(name) as container:  # so the list is right: FFmpeg, let free, follows it
            assert len(list(container.decode(video=0))) == 10
    for secret in ("secret.ts", "secret.mp4", f"file:{secret_folder}/secret.ts"):
        path = secret_folder / name
        path.write_text(LISTS[kind].replace("{}", secret))
        for backend in USABLE_BACKENDS:
            with open(path, "rb") as file:
                for video in (path, path.read_bytes(), file):
                    with pytest.raises(VideoDecodeError, match="not a readable video"):
                        load_video(video, backend=backend)


def test_a_pattern_in_a_name_reads_one_file(tmp_path):
    for number in range(3):
        Image.fromarray(numbered_picture(number)).save(tmp_path / f"{number}.jpg")
    Image.fromarray(numbered_picture(9)).save(tmp_path / "%d.jpg")
    frames, metadata = load_video(tmp_path / "%d.jpg", num_frames=None)
    assert read_numbers(frames) == [9] and metadata.total_num_frames == 1
