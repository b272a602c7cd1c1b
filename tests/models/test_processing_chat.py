"""Processors of the chat models: prompts, token counts, clips, templates, native checkpoints, bad input."""

import logging
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Blip2Processor,
    InstructBlipProcessor,
    LlavaProcessor,
)
from transformers.utils import logging as transformers_logging

from bt_adapter_hf import VideoError, get_bt_adapter_model
from bt_adapter_hf.models.modeling_bt_adapter_instructblip import BTAdapterInstructBlipForConditionalGeneration
from bt_adapter_hf.models.modeling_bt_adapter_llava import BTAdapterLlavaForConditionalGeneration
from bt_adapter_hf.models.modeling_bt_adapter_minigpt4 import BTAdapterMiniGPT4ForConditionalGeneration
from bt_adapter_hf.models.processing_bt_adapter_llava import BTAdapterLlavaProcessor
from bt_adapter_hf.models.processing_bt_adapter_qformer import (
    BTAdapterInstructBlipProcessor,
    BTAdapterMiniGPT4Processor,
)
from tests import clip_tools
from tests.chat import tiny_hosts
from tests.chat.tiny_hosts import PATCHES, QUERIES


IMAGE, VIDEO = 18, 19


def save_llava(folder):
    tiny_hosts.llava().save_pretrained(folder)
    LlavaProcessor(
        tiny_hosts.image_processor(),
        tiny_hosts.tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)


def save_instructblip(folder):
    tiny_hosts.instructblip().save_pretrained(folder)
    InstructBlipProcessor(
        tiny_hosts.blip_image_processor(),
        tiny_hosts.tokenizer(),
        qformer_tokenizer=tiny_hosts.tokenizer(extra=()),
        num_query_tokens=QUERIES,
    ).save_pretrained(folder)


def save_blip2(folder):
    tiny_hosts.blip2().save_pretrained(folder)
    Blip2Processor(
        tiny_hosts.blip_image_processor(), tiny_hosts.tokenizer(), num_query_tokens=QUERIES
    ).save_pretrained(folder)


HOSTS = {
    "llava": (save_llava, BTAdapterLlavaProcessor, BTAdapterLlavaForConditionalGeneration, PATCHES),
    "instructblip": (
        save_instructblip,
        BTAdapterInstructBlipProcessor,
        BTAdapterInstructBlipForConditionalGeneration,
        QUERIES,
    ),
    "minigpt4": (save_blip2, BTAdapterMiniGPT4Processor, BTAdapterMiniGPT4ForConditionalGeneration, QUERIES),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Native checkpoints with their processors, by the name of the host."""
    made = {name: tmp_path_factory.mktemp(name) for name in HOSTS}
    for name, folder in made.items():
        HOSTS[name][0](folder)
    return made


@pytest.fixture(scope="module", params=list(HOSTS))
def host(request, folders):
    """(processor, tokens per visual)"""
    _, processor_class, _, tokens = HOSTS[request.param]
    return processor_class.from_pretrained(folders[request.param], num_frames=4), tokens


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A video file of 12 frames at 4 frames per second."""
    return clip_tools.write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", count=12, fps=4)


def frames(T: int = 6) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (T, 40, 48, 3), dtype=np.uint8)


def picture() -> Image.Image:
    return Image.fromarray(frames(1)[0])


def ask(*parts, answer: str | None = None) -> list[dict]:
    chat = [{"role": "user", "content": list(parts)}]
    return chat if answer is None else [*chat, {"role": "assistant", "content": answer}]


def text(words: str = "what happens ?") -> dict:
    return {"type": "text", "text": words}


TEMPLATE = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}


# ----------------------------------------------------------------------------------------------------- what all share


def test_an_answer_is_learned_where_it_is_asked_for(host):
    """What a model is prompted with is what stood before the answer in tuning, token by token."""
    processor, _ = host
    seen = {"type": "image", "image": picture()}
    before = ask(seen, text(), answer="red") + ask(text("where ?"))
    for messages in (ask(seen, text()), before):
        whole = [*messages, {"role": "assistant", "content": "the red square"}]
        said = processor.apply_chat_template(messages, add_generation_prompt=True)
        rest = processor.apply_chat_template(whole).removeprefix(said)
        assert rest.startswith(" the red square")  # a line break would be a token that no prompt has
        prompt = processor.apply_chat_template([messages], **TEMPLATE)["input_ids"][0].tolist()
        learned = processor.apply_chat_template(
            [whole],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
        )
        ids, is_answer = learned["input_ids"][0].tolist(), torch.as_tensor(learned["assistant_masks"])[0].tolist()
        assert ids[: len(prompt)] == prompt
        assert all(is_answer[len(prompt) :]) and not is_answer[len(prompt) - 1]


def test_conversations_of_images_and_videos(host, clip):
    processor, tokens = host
    seen = {"type": "image", "image": picture()}
    first = ask({"type": "video", "path": str(clip)}, seen, text(), answer="the red") + ask(text("where ?"))
    second = ask({"type": "video", "video": frames()}, text("where is the red square ?"))
    inputs = processor.apply_chat_template([first, second, ask(text("what ?"))], **TEMPLATE)
    ids = inputs["input_ids"]
    assert [(row == IMAGE).sum().item() for row in ids] == [tokens, 0, 0]
    assert [(row == VIDEO).sum().item() for row in ids] == [tokens, tokens, 0]
    assert inputs["pixel_values"].shape == (1, 3, 32, 32)
    assert inputs["pixel_values_videos"].shape == (2, 4, 3, 32, 32) and "frame_mask" not in inputs
    # padded on the left, for generation
    mask = inputs["attention_mask"]
    assert (mask[:, -1] == 1).all() and mask[2, 0] == 0
    assert (ids[mask == 0] == 0).all() and torch.equal(mask, mask.sort(dim=1).values)
    # a video stands where its placeholder stands, in one run
    places = (ids[1] == VIDEO).nonzero().flatten()
    assert torch.equal(places, torch.arange(places[0], places[0] + tokens))


@torch.no_grad()
def test_the_model_answers_what_the_processor_prepares(host, folders, clip):
    processor, _ = host
    name = next(name for name, entry in HOSTS.items() if entry[1] is type(processor))
    model = HOSTS[name][2].from_pretrained(folders[name])
    assert model.config.video_token_id == processor.video_token_id
    chats = [
        ask({"type": "video", "path": str(clip)}, text()),
        ask({"type": "image", "image": picture()}, {"type": "video", "video": frames()}, text("where ?")),
    ]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "suppress_tokens": [18, 19], "do_sample": False}
    inputs = processor.apply_chat_template(chats, **TEMPLATE)
    together = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    for row, chat in enumerate(chats):
        inputs = processor.apply_chat_template(chat, **TEMPLATE)
        alone = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
        assert torch.equal(alone[0], together[row])
    assert all(isinstance(answer, str) for answer in processor.post_process_image_text_to_text(together))


def test_unequal_videos(host):
    processor, tokens = host
    videos = [frames(3), frames(5)]
    inputs = processor(
        text=["<video> what", "<video> where"], videos=videos, do_sample_frames=False, return_tensors="pt"
    )
    assert inputs["pixel_values_videos"].shape[:2] == (2, 5)
    assert inputs["frame_mask"].sum(dim=1).tolist() == [3, 5]
    assert (inputs["input_ids"] == VIDEO).sum(dim=1).tolist() == [tokens, tokens]


def test_frame_indices_and_times(host, clip):
    processor, _ = host
    inputs = processor(text="<video> what", videos=str(clip), num_frames=3, return_metadata=True, return_tensors="pt")
    assert inputs["pixel_values_videos"].shape[1] == 3
    # centres of three equal segments of twelve frames (0 to 11), rounded as in the released code
    assert list(inputs["video_metadata"][0].frames_indices) == [2, 5, 9]
    assert list(inputs["video_metadata"][0].frame_timestamps) == pytest.approx([0.5, 1.25, 2.25])
    assert "video_metadata" not in processor(text="<video> what", videos=str(clip), return_tensors="pt")


def test_clips(host, clip, caplog):
    processor, tokens = host
    transformers_logging.get_logger("bt_adapter_hf").propagate = True
    logging.Logger.warning_once.cache_clear()  # other tests may have met the same warning
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            inputs = processor(
                text="<video> what", videos=str(clip), num_clips=3, return_metadata=True, return_tensors="pt"
            )
    assert caplog.text.count(f"{3 * tokens} tokens per video") == 1
    assert (inputs["input_ids"] == VIDEO).sum() == 3 * tokens
    assert inputs["pixel_values_videos"].shape == (3, 4, 3, 32, 32)
    # the clips one after the other are the frames of the whole
    whole = processor(text="<video> what", videos=str(clip), num_frames=12, return_metadata=True, return_tensors="pt")
    assert inputs["video_metadata"][0].frames_indices == whole["video_metadata"][0].frames_indices
    assert torch.equal(inputs["pixel_values_videos"].flatten(0, 1), whole["pixel_values_videos"][0])
    # frames given as they are, of a number that is no multiple
    cut = processor(text="<video> a", videos=frames(7), num_clips=2, do_sample_frames=False, return_tensors="pt")
    assert cut["frame_mask"].sum(dim=1).tolist() == [4, 3]
    with pytest.raises(ValueError, match="2 frames, too few for 3 clips"):
        processor(text="<video> a", videos=frames(2), num_clips=3, do_sample_frames=False)


def test_nested_arguments(host, clip):
    """`videos_kwargs` and its like, of `processor(...)` and through `processor_kwargs`, as flat ones."""
    processor, tokens = host
    flat = processor(text="<video> what", videos=str(clip), num_clips=2, num_frames=3, return_tensors="pt")
    assert flat["pixel_values_videos"].shape[:2] == (2, 3) and (flat["input_ids"] == VIDEO).sum() == 2 * tokens
    nested = {"videos_kwargs": {"num_clips": 2, "num_frames": 3}, "text_kwargs": {"return_tensors": "pt"}}
    inputs = processor(text="<video> what", videos=str(clip), **nested)
    assert all(torch.equal(torch.as_tensor(inputs[key]), torch.as_tensor(flat[key])) for key in flat)
    chat = ask({"type": "video", "path": str(clip)}, text())
    inputs = processor.apply_chat_template(chat, **TEMPLATE, processor_kwargs={"videos_kwargs": {"num_clips": 2}})
    assert inputs["pixel_values_videos"].shape[0] == 2 and (inputs["input_ids"] == VIDEO).sum() == 2 * tokens
    assert processor.num_clips == 1
    right = processor(text=["what", "what is"], text_kwargs={"padding_side": "right"}, return_tensors="pt")
    assert right["attention_mask"][0, -1] == 0
    seen = processor(text="<image> a", images=picture(), images_kwargs={"do_normalize": False}, return_tensors="pt")
    assert 0 <= seen["pixel_values"].min() and seen["pixel_values"].max() <= 1
    with pytest.raises(ValueError, match="num_clips was passed two times"):
        processor(text="<video> a", videos=str(clip), num_clips=2, videos_kwargs={"num_clips": 2})


def test_kinds_of_visual_tokens(host, clip):
    processor, tokens = host
    inputs = processor(
        text="<video> what <image> is", videos=str(clip), images=picture(), return_mm_token_type_ids=True
    )
    kinds = inputs["mm_token_type_ids"][0]
    assert (kinds.count(2), kinds.count(1), len(kinds)) == (tokens, tokens, len(inputs["input_ids"][0]))


def test_one_prompt_needs_no_padding_token(host, folders, tmp_path):
    name = next(name for name, entry in HOSTS.items() if entry[1] is type(host[0]))
    processor = type(host[0]).from_pretrained(folders[name])
    processor.tokenizer.pad_token = None
    inputs = processor(text="<image> what ?", images=picture(), return_tensors="pt")
    assert inputs["attention_mask"].all() and (inputs["input_ids"] == IMAGE).sum() == host[1]
    with pytest.raises(ValueError, match="pad"):
        processor(text=["what", "what is"])


@torch.no_grad()
def test_model_and_processor_agree_beside_other_added_tokens(host, folders, tmp_path):
    name = next(name for name, entry in HOSTS.items() if entry[1] is type(host[0]))
    _, processor_class, model_class, _ = HOSTS[name]
    shutil.copytree(folders[name], tmp_path / "native")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "native")
    tokenizer.add_tokens(["<loc1>", "<loc2>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "native")
    model, processor = (
        model_class.from_pretrained(tmp_path / "native"),
        processor_class.from_pretrained(tmp_path / "native"),
    )
    assert model.config.video_token_id == processor.video_token_id == VIDEO + 2
    model.generate(**processor(text="<video> <loc1> ?", videos=frames(4), return_tensors="pt"), max_new_tokens=1)
    # one that is made in memory, and what is saved
    native = AutoModelForImageTextToText.from_pretrained(tmp_path / "native")
    assert get_bt_adapter_model(native).config.video_token_id == VIDEO + 2
    model.save_pretrained(tmp_path / "ours")
    assert model_class.from_pretrained(tmp_path / "ours").config.video_token_id == VIDEO + 2
    # a tokenizer that has the token already keeps it
    processor.tokenizer.add_tokens(["<loc3>"], special_tokens=True)
    processor.tokenizer.save_pretrained(tmp_path / "native")
    assert model_class.from_pretrained(tmp_path / "native").config.video_token_id == VIDEO + 2
    assert processor_class.from_pretrained(tmp_path / "native").video_token_id == VIDEO + 2


def test_saves_and_reloads(host, tmp_path, clip):
    processor, _ = host
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is type(processor) and again.chat_template == processor.chat_template
    chat = ask({"type": "video", "path": str(clip)}, text())
    ours, theirs = (p.apply_chat_template(chat, **TEMPLATE) for p in (processor, again))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    changed = type(processor).from_pretrained(tmp_path, num_frames=2, num_clips=2)
    assert (changed.video_processor.num_frames, changed.num_clips) == (2, 2)
    assert changed.video_processor.sampling == processor.video_processor.sampling == "centers"


def test_default_sampling_is_that_of_the_released_video_llm(folders):
    processor = BTAdapterLlavaProcessor.from_pretrained(folders["llava"])
    assert (processor.video_processor.num_frames, processor.video_processor.sampling) == (64, "centers")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"text": "<video> <video> what", "videos": frames()}, "2 <video> placeholders .* 1 videos"),
        ({"text": "<video> what"}, "1 <video> placeholders .* 0 videos"),
        ({"text": ["<image> a", "b"], "images": [picture()] * 2}, r"1 <image> placeholders \(\[1, 0\].* 2 images"),
        ({"text": "<video> ", "videos": frames()}, "ask a question"),
        ({"text": ["a", 3]}, "list of strings"),
        ({}, "needs text, images or videos"),
        ({"text": "<video> a", "videos": frames(), "num_clips": 0}, "at least 1"),
    ],
)  # fmt: skip
def test_bad_input(host, inputs, message):
    with pytest.raises(ValueError, match=message):
        host[0](**inputs)


def test_a_missing_file_in_the_middle_of_a_batch(host, clip):
    with pytest.raises(VideoError, match=r"videos\[1\]: .*nowhere.mp4"):
        host[0](text=["<video> a"] * 3, videos=[str(clip), "nowhere.mp4", str(clip)])


def test_conversations_without_a_question(host, clip):
    processor, _ = host
    for chat, message in (
        (ask({"type": "video", "path": str(clip)}, text(" ")), "ask a question"),
        (ask({"type": "video", "path": str(clip)}), "ask a question"),
        (ask({"type": "sound", "path": "a.wav"}, text()), "part of type 'sound'"),
        ([], "has no messages"),
    ):
        with pytest.raises(ValueError, match=message):
            processor.apply_chat_template([chat], **TEMPLATE)


def test_visual_tokens_are_never_cut(host):
    processor, tokens = host
    inputs = {"text": "<video> what", "videos": frames(), "truncation": True}
    with pytest.raises(ValueError, match="truncation|cut visual tokens"):
        processor(**inputs, max_length=tokens - 1)
    inputs["text"] = "<video> what what what what"
    assert len(processor(**inputs, max_length=tokens + 3)["input_ids"][0]) == tokens + 3


# -------------------------------------------------------------------------------------------------- one host at a time


def test_llava_prompt(folders):
    processor = BTAdapterLlavaProcessor.from_pretrained(folders["llava"], num_frames=4)
    seen = {"type": "image", "image": picture()}
    chat = [{"role": "system", "content": "be nice ."}, *ask({"type": "video", "video": frames()}, seen, text())]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert prompt == "be nice . USER: <video>\n<image>\nwhat happens ? ASSISTANT:"
    chat += [{"role": "assistant", "content": "red ."}]
    assert processor.apply_chat_template(chat).endswith("what happens ? ASSISTANT: red .</s>")
    inputs = processor.apply_chat_template(
        chat, **{**TEMPLATE, "add_generation_prompt": False}, return_assistant_tokens_mask=True
    )
    answer = inputs["input_ids"][0][torch.as_tensor(inputs["assistant_masks"][0]).bool()]
    assert processor.decode(answer) == "red . </s>"


def test_llava_images_are_those_of_the_native_processor(folders):
    native = LlavaProcessor.from_pretrained(folders["llava"])
    ours = BTAdapterLlavaProcessor.from_pretrained(folders["llava"])
    inputs = {"images": picture(), "text": "USER : <image> what ?", "return_tensors": "pt"}
    a, b = native(**inputs), ours(**inputs)
    assert torch.equal(a["input_ids"], b["input_ids"]) and torch.equal(a["pixel_values"], b["pixel_values"])


def test_instructblip_images_are_those_of_the_native_processor(folders):
    native = InstructBlipProcessor.from_pretrained(folders["instructblip"])
    ours = BTAdapterInstructBlipProcessor.from_pretrained(folders["instructblip"])
    inputs = {"images": picture(), "text": "what happens ?", "return_tensors": "pt"}
    a, b = native(**inputs), ours(**inputs)
    assert set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)


def test_instructblip_prompt(folders):
    """Visual tokens before the start token; the Q-Former reads the words of its own row."""
    processor = BTAdapterInstructBlipProcessor.from_pretrained(folders["instructblip"], num_frames=4)
    inputs = processor(videos=frames(), text="what happens ?", return_tensors="pt")
    words = processor.tokenizer("what happens ?")["input_ids"]
    assert inputs["input_ids"][0].tolist() == [VIDEO] * QUERIES + words
    assert inputs["qformer_input_ids"][0].tolist() == processor.qformer_tokenizer("what happens ?")["input_ids"]
    chat = ask({"type": "video", "video": frames()}, text())
    again = processor.apply_chat_template(chat, **TEMPLATE)
    assert all(torch.equal(inputs[key], again[key]) for key in inputs)
    processor.qformer_tokenizer.model_max_length = 3
    with pytest.raises(ValueError, match="Q-Former reads 3 tokens"):
        processor(videos=frames(), text="what happens ?")


def test_minigpt4_prompt(folders):
    processor = BTAdapterMiniGPT4Processor.from_pretrained(folders["minigpt4"], num_frames=4)
    chat = ask({"type": "video", "video": frames()}, text(), answer="red") + ask(text("where ?"))
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert prompt == (
        "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I provide it to "
        "you. Please answer my questions.###Human: <Img><video></Img> what happens ?###Assistant: red###Human: where "
        "?###Assistant:"
    )
    # the pieces are tokenized apart, and only the first has the start token
    before, after = prompt.split("<video>")
    encode = processor.tokenizer.encode
    expected = encode(before) + [VIDEO] * QUERIES + encode(after, add_special_tokens=False)
    assert processor.apply_chat_template(chat, **TEMPLATE)["input_ids"][0].tolist() == expected
    system = [{"role": "system", "content": "Hello."}, *chat]
    assert processor.apply_chat_template(system).startswith("Hello.###Human: <Img>")


def test_minigpt4_answers_end_at_the_stop_sign(folders):
    processor = BTAdapterMiniGPT4Processor.from_pretrained(folders["minigpt4"])
    processor.tokenizer.add_tokens(["###"])
    ids = processor.tokenizer("the red square ### USER : what", add_special_tokens=False, return_tensors="pt")
    assert processor.post_process_image_text_to_text(ids["input_ids"]) == ["the red square"]


def test_minigpt4_processor_of_components(folders, tmp_path):
    tiny_hosts.tokenizer(extra=()).save_pretrained(tmp_path)
    processor = BTAdapterMiniGPT4Processor.from_components(vision_qformer=folders["minigpt4"], language_model=tmp_path)
    assert (processor.image_token_id, processor.video_token_id) == (IMAGE, VIDEO)
    assert processor.num_query_tokens == QUERIES
