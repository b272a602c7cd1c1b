"""How many frames the time embeddings are trained for: order at other lengths, what a run records, varied lengths."""

import copy
import logging

import pytest
import torch

from bt_adapter_hf import BTAdapterForPreTraining, BTAdapterModel, BTAdapterProcessor
from bt_adapter_hf.assets import default_model_path
from bt_adapter_hf.data.moving_digits import all_captions, clip
from bt_adapter_hf.data.pairs import PairCollator, PairDataset, load_table
from bt_adapter_hf.evaluation.moving_digits import motion_scores
from bt_adapter_hf.training.arguments import BTAdapterTrainingArguments
from bt_adapter_hf.training.trained_frames import record_trained_frames, vary_frames
from bt_adapter_hf.training.trainer import BTAdapterTrainer
from tests import tiny_pairs


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return tiny_pairs.write_table(tmp_path_factory.mktemp("frames") / "clips").parent


# ------------------------------------------------------------------------------------------------------ order


@pytest.fixture(scope="module")
def digits():
    """The shipped model, trained at 8 frames, with the table of 64 rows that `bt-adapter pretrain` makes."""
    torch.manual_seed(0)
    model = BTAdapterModel.from_pretrained(default_model_path())
    assert model.config.vision_config.num_trained_frames == 8
    table = torch.randn(64, model.config.vision_config.hidden_size)
    table[:8] = model.vision_model.bt_adapter.time_embedding.weight.data
    model.vision_model.bt_adapter.time_embedding = torch.nn.Embedding.from_pretrained(table)
    model.config.vision_config.max_frames = 64
    processor = BTAdapterProcessor.from_pretrained(default_model_path())
    films = [clip("test", 1000, index) for index in range(0, 360, 8)]
    return model, processor, films


@torch.no_grad()
def order(digits, T: int) -> float:
    model, processor, films = digits
    captions = processor(text=all_captions(), padding=True, return_tensors="pt")
    videos = processor(videos=[film for film, _, _ in films], num_frames=T, return_tensors="pt")
    texts = model.get_text_features(**captions).pooler_output
    features = model.get_video_features(**videos).pooler_output
    return motion_scores(texts, features, [facts for _, _, facts in films])["order"]


@pytest.mark.parametrize("T", [4, 6, 8, 12, 16, 32])
def test_order_at_other_lengths_than_the_trained(digits, T):
    assert order(digits, T) >= 95


def test_rows_that_were_never_trained_are_noise(digits):
    """What the config's field is for: read as released, the same table is near chance (50) at twice the frames."""
    digits[0].config.vision_config.num_trained_frames = 0
    try:
        assert order(digits, 8) >= 95
        assert order(digits, 16) <= 75
    finally:
        digits[0].config.vision_config.num_trained_frames = 8


# --------------------------------------------------------------------------------------------- what a run records


def trainer(clips, folder, model, num_frames: int = 4, **options) -> BTAdapterTrainer:
    processor = tiny_pairs.processor(num_frames)
    args = BTAdapterTrainingArguments(
        output_dir=folder,
        use_cpu=True,
        per_device_train_batch_size=2,
        disable_tqdm=True,
        report_to="none",
        **{"max_steps": 1, "save_strategy": "no", **options},
    )
    data = PairDataset(load_table(clips), processor, training=True, item_timeout=None)
    collator = PairCollator(processor)
    return BTAdapterTrainer(
        model=model, args=args, train_dataset=data, data_collator=collator, processing_class=processor
    )


@pytest.mark.parametrize("before, after", [(0, 4), (None, None), (7, 7)])
def test_a_run_records_its_frames_where_nothing_is_recorded(clips, tmp_path, before, after):
    model = tiny_pairs.model(vision={"num_trained_frames": before})
    run = trainer(clips, tmp_path, model)
    run.train()
    run.save_model()
    saved = BTAdapterForPreTraining.from_pretrained(tmp_path)
    assert saved.config.vision_config.num_trained_frames == after
    assert saved.vision_model.bt_adapter.config.num_trained_frames == after


def test_what_is_recorded_of_other_models(caplog):
    short = tiny_pairs.model(vision={"max_frames": 3})
    record_trained_frames(short, 8)
    assert short.config.vision_config.num_trained_frames == 3  # all rows learn by interpolation
    frozen = tiny_pairs.model()
    frozen.requires_grad_(False)
    record_trained_frames(frozen, 8)
    assert frozen.config.vision_config.num_trained_frames == 0
    peft_like = tiny_pairs.model()
    tower = peft_like.vision_model
    tower.bt_adapter.requires_grad_(False)
    tower.copy_of_peft = copy.deepcopy(tower.bt_adapter).requires_grad_(True)
    record_trained_frames(peft_like, 8)
    assert tower.copy_of_peft.config.num_trained_frames == tower.config.num_trained_frames == 8
    with caplog.at_level(logging.WARNING, "bt_adapter_hf"):
        record_trained_frames(peft_like, 16)
        assert not caplog.records
        record_trained_frames(peft_like, 64)
    assert "were trained for 8 frames per video and are interpolated to 64" in caplog.text


# ------------------------------------------------------------------------------------------------- varied lengths


def test_one_frame_of_each_part():
    videos = torch.arange(16.0).view(1, 16, 1, 1, 1).expand(2, 16, 3, 2, 2)
    lengths = set()
    for step in range(60):
        varied = vary_frames(videos, [4, 8, 16], seed=3, step=step)
        T = varied.shape[1]
        lengths.add(T)
        frames = varied[0, :, 0, 0, 0]
        assert (frames // (16 // T)).tolist() == list(range(T))
        assert torch.equal(varied, vary_frames(videos, [4, 8, 16], seed=3, step=step))
    assert lengths == {4, 8, 16}
    picked = {tuple(vary_frames(videos, [4], 3, step)[0, :, 0, 0, 0].tolist()) for step in range(20)}
    assert len(picked) > 10


def test_training_on_varied_lengths(clips, tmp_path):
    model = tiny_pairs.model(mask_ratio=0.5)
    seen = []
    model.vision_model.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    run = trainer(clips, tmp_path, model, num_frames=6, frame_counts=[2, 3, 6], max_steps=8)
    run.train()
    assert set(seen) == {2, 3, 6}
    assert model.config.vision_config.num_trained_frames == 6
    videos = torch.randn(2, 6, 3, 16, 16)
    states = {n: videos.new_zeros(2, 6, 5, 16) + torch.arange(6.0)[:, None, None] for n in (1, 2)}
    words = {"input_ids": torch.ones(2, 4, dtype=torch.long), "broken": []}
    for step in range(4):  # states of the backbone lose the same frames
        run.state.global_step = step
        short = run._model_inputs({**words, "backbone_states": dict(states)}, "train")["backbone_states"]
        of_videos = run._model_inputs({**words, "pixel_values_videos": videos}, "train")["pixel_values_videos"]
        frames = [int(frame) for frame in short[1][0, :, 0, 0]]
        assert torch.equal(of_videos, videos[:, frames]) and torch.equal(short[1], short[2])
    with pytest.raises(ValueError, match="asks for more frames than the 6 per clip"):
        trainer(clips, tmp_path, model, num_frames=6, frame_counts=[2, 8])
    with pytest.raises(ValueError, match="must be numbers of at least 1"):
        trainer(clips, tmp_path, model, frame_counts=[0, 4])
