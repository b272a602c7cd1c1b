"""The cache of frozen states: the same training without decoding and without the backbone."""

import json
import shutil
import time
import zipfile
from pathlib import Path

import pytest
import torch

from bt_adapter_hf import VideoError
from bt_adapter_hf.adapters.host_modules import find_tower
from bt_adapter_hf.data.instructions import load_instructions
from bt_adapter_hf.models import video_io
from bt_adapter_hf.training import frozen_states
from bt_adapter_hf.training.frozen_states import FrozenStates, build_states, plan_states, selected_states, video_key
from tests import tiny_instructions
from tests.chat import tiny_hosts
from tests.tiny_instructions import Host, losses, make_trainer


@pytest.fixture(scope="module", params=list(tiny_instructions.CLASSES))
def host(request, tmp_path_factory):
    return Host(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return Host("llava", tmp_path_factory.mktemp("llava-alone"))


@pytest.fixture
def table(tmp_path):
    return tiny_instructions.write_table(tmp_path / "clips")


def videos_of(table):
    return sorted(str(path) for path in table.parent.glob("*.mp4"))


def build(folder, host, videos, dtype="fp32", **options):
    model, processor = host.model(), host.processor()
    plan = plan_states(folder, model, processor, videos, dtype)
    return plan, build_states(plan, model, processor, **options)


def opened(folder, host):
    return FrozenStates(folder, host.model(), host.processor())


@torch.no_grad()
def test_states_stand_in_for_pixels(host):
    """The same output, bit for bit, of a batch and of videos of unequal length."""
    model = host.model().eval()
    tower = find_tower(model)
    pixels = torch.cat([tiny_hosts.video(5, seed=seed) for seed in (1, 2)])
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    wanted = selected_states(model)
    states = tower.encode_frames(pixels, wanted)
    assert list(states) == tower.needed_states(wanted)
    for frame_mask in (None, mask):
        own = {n: x if frame_mask is None else x * frame_mask[..., None, None] for n, x in states.items()}
        # the layer before the last is what LLaVA reads; nothing computes the last one's tokens then
        for layer, name in ((wanted, "hidden_states"), (-1, "last_hidden_state")):
            if name == "last_hidden_state" and tower.config.num_hidden_layers not in states:
                assert tower(backbone_states=own, output_hidden_states=wanted).last_hidden_state is None
                continue
            a = tower(pixels, frame_mask=frame_mask, output_hidden_states=layer)
            b = tower(backbone_states=own, frame_mask=frame_mask, output_hidden_states=layer)
            a, b = (x[name][layer] if name == "hidden_states" else x[name] for x in (a, b))
            torch.testing.assert_close(a, b, rtol=0, atol=0 if frame_mask is None else 1e-6)


def test_states_that_are_not_enough(llava):
    tower = find_tower(llava.model())
    states = tower.encode_frames(tiny_hosts.video(), -2)
    with pytest.raises(ValueError, match="expected at least"):
        tower(backbone_states={k: v for k, v in states.items() if k != 3}, output_hidden_states=-2)
    with pytest.raises(ValueError, match="stand in for pixel_values"):
        tower(tiny_hosts.video(), backbone_states=states)
    with pytest.raises(ValueError, match="Pass pixel_values, or backbone_states"):
        tower()


# Relative difference of losses: float32 differs by the order of sums, the others by what they can hold.
@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [
        ("llava", "fp32", 1e-6),
        ("llava", "bf16", 5e-3),
        ("llava", "fp8", 5e-2),
        ("instructblip", "fp32", 1e-6),
        ("blip-2", "fp32", 1e-6),
    ],
)
def test_training_from_states_gives_the_same_losses(name, dtype, tolerance, table, tmp_path, monkeypatch):
    host = Host(name, tmp_path / "host")
    expected = make_trainer(host, table, tmp_path / "pixels", max_steps=4)
    expected.train()
    build(tmp_path / "states", host, videos_of(table), dtype)
    trainer = make_trainer(host, table, tmp_path / "out", max_steps=4, states=opened(tmp_path / "states", host))

    def no_backbone(*args, **kwargs):
        raise AssertionError("the backbone ran")

    monkeypatch.setattr(find_tower(trainer.model).vision_model, "forward", no_backbone)
    monkeypatch.setattr("bt_adapter_hf.models.video_io.load_pyav", no_backbone)
    trainer.train()
    assert losses(trainer) == pytest.approx(losses(expected), rel=tolerance)


def test_bit_equal_where_a_step_sees_one_video(llava, table, tmp_path):
    """A batch of one: the backbone computes the same sums then and now."""
    build(tmp_path / "states", llava, videos_of(table))
    options = {"per_device_train_batch_size": 1, "max_steps": 5}
    expected = make_trainer(llava, table, tmp_path / "a", **options)
    expected.train()
    trainer = make_trainer(llava, table, tmp_path / "b", states=opened(tmp_path / "states", llava), **options)
    trainer.train()
    assert losses(trainer) == losses(expected)


def test_the_size_is_known_beforehand(llava, table, tmp_path, monkeypatch):
    for dtype in ("fp32", "bf16", "fp8"):
        folder = tmp_path / dtype
        plan, _ = build(folder, llava, videos_of(table), dtype)
        written = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        assert plan.bytes_to_write == plan.bytes_per_video * 8 <= written < plan.bytes_to_write + 4096
        assert f"8 videos in {folder}" in str(plan) and "3 states x 4 frames x 17 tokens x 24" in str(plan)
        again = plan_states(folder, llava.model(), llava.processor(), videos_of(table), dtype)
        assert "; 0 videos to encode" in str(again)
    monkeypatch.setattr(frozen_states.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1000))
    with pytest.raises(ValueError, match="Too little room .* 8 videos to encode, .* with 0.00 MB free"):
        plan_states(tmp_path / "new", llava.model(), llava.processor(), videos_of(table))
    assert not (tmp_path / "new").exists()


def test_a_killed_run_goes_on(llava, table, tmp_path, monkeypatch):
    monkeypatch.setattr(frozen_states, "SHARD_VIDEOS", 2)
    seen = []

    def killed(loader):
        for count, item in enumerate(loader):
            if count == 5:
                raise KeyboardInterrupt
            seen.append(count)
            yield item

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "states", llava, videos_of(table), progress=killed)
    # as if killed while writing
    (tmp_path / "states" / ".states-000-00002.safetensors.1.partial").write_bytes(b"half")
    assert len(opened(tmp_path / "states", llava)) == 4
    plan, _ = build(tmp_path / "states", llava, videos_of(table))
    assert len(plan.missing) == 4
    again = opened(tmp_path / "states", llava)
    whole, _ = build(tmp_path / "whole", llava, videos_of(table))
    assert len(again) == len(whole.missing) == 8
    for video in videos_of(table):
        a, b = again.load([video]), opened(tmp_path / "whole", llava).load([video])
        assert all(torch.equal(a[n], b[n]) for n in a)
    assert not list((tmp_path / "states").glob(".*.partial"))


def test_killed_at_the_very_beginning(llava, table, tmp_path):
    folder = tmp_path / "states"
    folder.mkdir()
    (folder / ".frozen_states.json.1.partial").write_text("{")
    build(folder, llava, videos_of(table)[:1])
    assert len(opened(folder, llava)) == 1


def test_several_processes_share_the_work(llava, table, tmp_path):
    model, processor = llava.model(), llava.processor()
    folder = tmp_path / "states"
    plan = plan_states(folder, model, processor, videos_of(table), "bf16")
    for process in range(2):
        build_states(plan, model, processor, process=process, processes=2, workers=process)
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    assert names == ["states-000-00000.safetensors", "states-001-00000.safetensors"]
    assert len(FrozenStates(folder, model, processor)) == 8


def test_broken_videos_are_recorded_and_replaced(llava, table, tmp_path):
    clips = table.parent
    (clips / "clip1.mp4").write_bytes(b"no video at all")
    (clips / "clip2.mp4").unlink()
    videos = [str(clips / f"clip{i}.mp4") for i in range(8)]
    _, broken = build(tmp_path / "states", llava, videos)
    assert set(broken) == {videos[1], videos[2]} and "clip2.mp4" in broken[videos[2]]
    lines = [json.loads(line) for line in (tmp_path / "states" / "broken_videos.jsonl").open()]
    assert {line["video"]: line["reason"] for line in lines} == broken
    states = opened(tmp_path / "states", llava)
    with pytest.raises(VideoError, match="no video|Invalid data|cannot"):
        states.load([videos[1]])
    trainer = make_trainer(llava, table, tmp_path / "out", states=states, max_steps=4, max_broken=0.5)
    trainer.train()
    records = [json.loads(line) for line in (tmp_path / "out" / "broken_items.jsonl").open()]
    assert {record["index"] for record in records} == {1, 2}
    assert {record["reason"] for record in records} >= {broken[videos[1]]}
    # repaired, it is computed by the next run
    shutil.copyfile(clips / "clip3.mp4", clips / "clip1.mp4")
    (clips / "clip1.mp4").open("ab").write(b"\0")
    plan, broken = build(tmp_path / "states", llava, videos)
    assert list(plan.missing.values()) == [videos[1]] and set(broken) == {videos[2]}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_decoder_that_hangs_is_cut_off(llava, table, tmp_path, monkeypatch, workers):
    load = video_io.load_pyav

    def hang(source, *args, **kwargs):
        if source.name.endswith("clip1.mp4"):
            time.sleep(60)
        return load(source, *args, **kwargs)

    monkeypatch.setattr(video_io, "load_pyav", hang)
    _, broken = build(tmp_path / "states", llava, videos_of(table)[:3], item_timeout=1.0, workers=workers)
    assert list(broken) == [str(table.parent / "clip1.mp4")] and "longer than 1 s and was cut off" in str(broken)


def test_videos_in_archives(llava, table, tmp_path):
    """The same states as of the files, under names that change with the archive."""
    with zipfile.ZipFile(tmp_path / "clips.zip", "w") as archive:
        for video in videos_of(table):
            archive.write(video, f"clips/{Path(video).name}")
    build(tmp_path / "files", llava, videos_of(table))
    packed = load_instructions(table, media_root=tmp_path / "clips.zip")
    model, processor = llava.model(), llava.processor()

    def plan():
        return plan_states(tmp_path / "packed", model, processor, packed.videos(), "fp32", packed.archives)

    assert build_states(plan(), model, processor, workers=1) == {}
    states, files = (
        FrozenStates(tmp_path / "packed", model, processor, packed.archives),
        opened(tmp_path / "files", llava),
    )
    for video, name in zip(videos_of(table), sorted(packed.videos()), strict=True):
        a, b = states.load([name]), files.load([video])
        assert all(torch.equal(a[n], b[n]) for n in a)
    assert len(plan().missing) == 0
    with zipfile.ZipFile(tmp_path / "clips.zip", "a") as archive:
        archive.write(videos_of(table)[0], "clips/one_more.mp4")
    assert len(plan().missing) == 8


def test_a_video_that_was_changed_is_not_mistaken(llava, table, tmp_path):
    build(tmp_path / "states", llava, videos_of(table))
    states = opened(tmp_path / "states", llava)
    first, second = videos_of(table)[:2]
    moved = str(tmp_path / "moved.mp4")
    shutil.copyfile(first, moved)
    assert all(torch.equal(a, b) for a, b in zip(*(states.load([x]).values() for x in (first, moved)), strict=True))
    with open(second, "ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match="it was changed or added since"):
        states.load([second])
    assert video_key("https://host/a.mp4") == "https://host/a.mp4"


def test_states_of_another_model_or_processor_are_refused(llava, table, tmp_path):
    folder = tmp_path / "states"
    build(folder, llava, videos_of(table)[:2])
    model, processor = llava.model(), llava.processor()
    with pytest.raises(ValueError, match="num_frames 4, here 6"):
        FrozenStates(folder, model, llava.processor(num_frames=6))
    processor.video_processor.image_mean = [0.1, 0.2, 0.3]
    with pytest.raises(ValueError, match="image_mean"):
        FrozenStates(folder, model, processor)
    with pytest.raises(ValueError, match="dtype fp32, here bf16"):
        plan_states(folder, model, llava.processor(), [], "bf16")
    FrozenStates(folder, llava.model(dtype=torch.bfloat16), llava.processor())  # a cast copy is the same backbone
    tiny_hosts.stir(find_tower(model).vision_model)
    with pytest.raises(ValueError, match="other weights in the backbone"):
        FrozenStates(folder, model, llava.processor())
    with pytest.raises(ValueError, match="holds no frozen states"):
        FrozenStates(tmp_path / "nothing", llava.model(), llava.processor())
    (folder / "states-000-00000.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="is damaged .* delete it"):
        opened(folder, llava)


def test_states_that_cannot_be_frozen(llava, tmp_path):
    model, processor = llava.model(), llava.processor()
    with pytest.raises(ValueError, match="dtype of frozen states is 'fp4'; expected one of fp32, bf16, fp8"):
        plan_states(tmp_path, model, processor, [], "fp4")
    processor.video_processor.sampling = "jitter"
    with pytest.raises(ValueError, match="draws other frames each time"):
        plan_states(tmp_path, model, processor, [])
    find_tower(model).vision_model.requires_grad_(True)
    with pytest.raises(ValueError, match="The image backbone learns"):
        plan_states(tmp_path, model, llava.processor(), [])
