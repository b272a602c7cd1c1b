"""What generation does with images and videos beside greedy search: drafts, no cache, long prompts, mixed batches."""

import copy
import logging

import pytest
import torch
from transformers import (
    Blip2ForConditionalGeneration,
    InstructBlipForConditionalGeneration,
    LlavaForConditionalGeneration,
    OPTConfig,
)
from transformers.utils import logging as transformers_logging

from bt_adapter_hf import (
    BTAdapterInstructBlipForConditionalGeneration,
    BTAdapterLlavaForConditionalGeneration,
    BTAdapterMiniGPT4ForConditionalGeneration,
)
from tests.chat import saved_hosts, tiny_hosts
from tests.chat.tiny_hosts import PATCHES, QUERIES, images, left_padded, video


HOSTS = {
    "llava": (LlavaForConditionalGeneration, BTAdapterLlavaForConditionalGeneration, PATCHES),
    "instructblip": (
        InstructBlipForConditionalGeneration,
        BTAdapterInstructBlipForConditionalGeneration,
        QUERIES,
    ),
    "blip-2": (Blip2ForConditionalGeneration, BTAdapterMiniGPT4ForConditionalGeneration, QUERIES),
}
VIDEO = 19


class Host:
    def __init__(self, name: str, folder):
        native_class, model_class, self.tokens = HOSTS[name]
        self.name = name
        folder, adapter = saved_hosts.save(name, folder)
        self.native = native_class.from_pretrained(folder).eval()
        self.model = model_class.from_pretrained(folder, bt_adapter=adapter).eval()
        for model in (self.native, self.model):  # says any id, the placeholders' too
            head = model.lm_head if name == "llava" else model.language_model.lm_head
            torch.nn.init.normal_(head.weight, std=0.5, generator=torch.Generator().manual_seed(5))

    def prompt(self, *parts) -> torch.LongTensor:
        return tiny_hosts.prompt(*parts, tokens=self.tokens)

    def words(self, *words: int) -> dict[str, torch.Tensor]:
        """What the Q-Former of InstructBLIP reads, a word per row."""
        return (
            {"qformer_input_ids": torch.tensor([[3, word] for word in words])} if self.name == "instructblip" else {}
        )

    def inputs(self, kind: str) -> dict[str, torch.Tensor]:
        ids = self.prompt(4, kind, 5, 6) if kind else self.prompt(4, 5, 6)
        seen = {"image": {"pixel_values": images()}, "video": {"pixel_values_videos": video()}, "": {}}[kind]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **self.words(5), **seen}

    def answer(self, inputs: dict[str, torch.Tensor], model=None, **options) -> list[int]:
        options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **options}
        return (model or self.model).generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture(scope="module", params=list(HOSTS))
def host(request, tmp_path_factory):
    return Host(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return Host("llava", tmp_path_factory.mktemp("llava"))


def says_video_second(prompt: torch.LongTensor):
    """A logits processor with which the second id of the answer is that of the video placeholder."""

    def process(ids, scores):
        return (
            scores.scatter(1, torch.full_like(ids[:, :1], VIDEO), 1e9)
            if ids.shape[1] == prompt.shape[1] + 1
            else scores
        )

    return [process]


@pytest.mark.parametrize("kind", ["video", "image", ""])
def test_an_id_that_is_said_is_no_placeholder(llava, kind):
    """With or without a cache, with drafts of either kind, alone or in beams."""
    inputs = llava.inputs(kind)
    options = {"logits_processor": says_video_second(inputs["input_ids"])}
    expected = llava.answer(inputs, **options)
    assert expected[1] == VIDEO
    if kind != "video":
        assert llava.answer(inputs, llava.native, **options) == expected
    assert llava.answer(inputs, use_cache=False, **options) == expected
    assert llava.answer(inputs, prompt_lookup_num_tokens=3, **options) == expected
    assert llava.answer(inputs, assistant_model=copy.deepcopy(llava.model), **options) == expected
    beams = {**options, "num_beams": 2}
    assert llava.answer(inputs, use_cache=False, **beams) == llava.answer(inputs, **beams)


def test_drafts_for_a_video(host):
    inputs = host.inputs("video")
    assert host.answer(inputs, prompt_lookup_num_tokens=3) == host.answer(inputs)
    assistant = copy.deepcopy(host.model if host.name == "llava" else host.model.language_model)
    drafted = host.answer(inputs, assistant_model=assistant)
    if host.name == "llava":
        assert drafted == host.answer(inputs)
        options = {
            "min_new_tokens": 1,
            "suppress_tokens": [VIDEO],
        }  # a native assistant sees no video, and only drafts
        assert host.answer(inputs, assistant_model=copy.deepcopy(host.native), **options) == host.answer(
            inputs, **options
        )


def test_the_drafts_of_our_assistant_are_about_the_video(llava):
    """As good as the model's own words: with the same weights all of them are taken, so few rounds are needed."""
    rounds = []
    assistant = copy.deepcopy(llava.model)
    assistant.generation_config.num_assistant_tokens = 4
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    generate = assistant.generate
    assistant.generate = lambda *args, **kwargs: rounds.append(1) or generate(*args, **kwargs)
    llava.answer(llava.inputs("video"), assistant_model=assistant, max_new_tokens=9, min_new_tokens=9)
    assert len(rounds) == 2


@torch.no_grad()
def test_rows_of_text_images_and_videos_in_one_batch(host):
    rows = [host.inputs(kind) for kind in ("video", "", "image")]
    padded = left_padded(*(row["input_ids"] for row in rows))
    seen = {"pixel_values": images(), "pixel_values_videos": video()}
    batch = {**padded, **host.words(5, 5, 5), **seen}
    logits = host.model(**batch).logits
    together = host.model.generate(**batch, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    for index, row in enumerate(rows):
        length = row["input_ids"].shape[1]
        torch.testing.assert_close(logits[index, -length:], host.model(**row).logits[0], rtol=0, atol=1e-4)
        answer = host.answer(row, max_new_tokens=5, min_new_tokens=5)
        assert together[index, padded["input_ids"].shape[1] :].tolist() == answer


@torch.no_grad()
def test_a_prompt_beyond_the_positions_is_answered_where_the_native_model_answers(host, caplog):
    limit = host.model.config.get_text_config().max_position_embeddings
    ids = host.prompt("image", *[4] * limit)
    inputs = {"input_ids": ids, "pixel_values": images(), **host.words(4)}
    assert torch.equal(host.model(**inputs).logits, host.native(**inputs).logits)


@torch.no_grad()
def test_a_prompt_beyond_learned_positions_is_refused():
    config = OPTConfig(
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=32,
        max_position_embeddings=40,
        word_embed_proj_dim=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    native = tiny_hosts.instructblip(config)
    config = BTAdapterInstructBlipForConditionalGeneration.config_class.from_dict(
        {**native.config.to_dict(), "model_type": "bt_adapter_instructblip"}
    )
    model = BTAdapterInstructBlipForConditionalGeneration(config).eval()
    inputs = {"pixel_values": images(), "qformer_input_ids": torch.tensor([[3, 4]])}
    ids = tiny_hosts.prompt("image", *[4] * 41, tokens=QUERIES)
    with pytest.raises(ValueError, match=f"{ids.shape[1]} tokens long.*takes 40"):
        model(input_ids=ids, **inputs)
    with pytest.raises((IndexError, ValueError)):
        native(input_ids=ids, **inputs)


@torch.no_grad()
def test_hidden_states_of_videos(host):
    """As many as the native model gives of images, and the same features with them as without."""
    words = host.words(5)
    asked = host.model.get_video_features(video(), **words, output_hidden_states=True, output_attentions=True)
    native = host.native.get_image_features(images(), **words, output_hidden_states=True)
    assert len(asked.hidden_states) == len(native.hidden_states)
    plain = host.model.get_video_features(video(), **words).pooler_output
    assert all(map(torch.equal, asked.pooler_output, plain))
    if host.name != "llava":
        given = [output.qformer_outputs.hidden_states for output in (asked, native)]
        assert (given[0] is None) == (given[1] is None)


@torch.no_grad()
def test_far_other_numbers_of_frames_than_trained_are_warned_of(host, monkeypatch, caplog):
    transformers_logging.get_logger("bt_adapter_hf").propagate = True
    logging.Logger.warning_once.cache_clear()  # other tests may have met the same warning
    monkeypatch.setattr(host.model.config.vision_config, "num_trained_frames", 4)
    for T in (2, 4, 8):
        host.model.get_video_features(video(T), **host.words(5))
    assert "trained on" not in caplog.text
    host.model.get_video_features(video(9), **host.words(5))
    assert "have 9 frames, and the branch was trained on 4: set num_frames=4" in caplog.text


def test_what_is_missing_is_named(host):
    if host.name == "llava":
        return
    with pytest.raises(ValueError, match="placeholders in input_ids"):
        host.model(pixel_values_videos=video(), **host.words(5))
    with pytest.raises(ValueError, match="placeholders in input_ids"):
        host.model(pixel_values=images(), **host.words(5))


@torch.no_grad()
def test_the_epsilon_behind_minigpt4s_tower_is_saved_and_loaded(tmp_path):
    parts = saved_hosts.save_minigpt4_parts(tmp_path)
    model = BTAdapterMiniGPT4ForConditionalGeneration.from_components(**parts)
    model.save_pretrained(tmp_path / "saved")
    again = BTAdapterMiniGPT4ForConditionalGeneration.from_pretrained(tmp_path / "saved")
    inside = again.config.vision_config.backbone.layer_norm_eps
    for loaded in (model, again):
        tower = loaded.vision_model.vision_model
        assert (tower.post_layernorm.eps, tower.encoder.layers[0].layer_norm1.eps) == (1e-5, inside)
        assert inside == 1e-6
    tiny = images() * 0  # where an epsilon shows
    before, after = (m.get_image_features(tiny).pooler_output for m in (model, again))
    assert torch.equal(before, after)
    native = BTAdapterMiniGPT4ForConditionalGeneration.from_pretrained(parts["vision_qformer"])
    native.save_pretrained(tmp_path / "native-eps")
    again = BTAdapterMiniGPT4ForConditionalGeneration.from_pretrained(tmp_path / "native-eps")
    assert again.vision_model.vision_model.post_layernorm.eps == inside
