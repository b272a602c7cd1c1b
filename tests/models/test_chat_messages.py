"""Chat templates of other hosts, and the forms in which callers write messages."""

import base64
import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaProcessor

from bt_adapter_hf import BTAdapterLlavaProcessor, VideoError
from tests import clip_tools
from tests.chat import saved_hosts
from tests.chat.tiny_hosts import PATCHES


IMAGE, VIDEO = 18, 19
# As on the Hub, shortened in no place that writes anything.
LLAVA_HF = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}{% for content in "
    "message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}"
    "{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a "
    "helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<image>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
PIXTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST]{% if message['content'] is "
    "string %}{{ message['content'] }}{% else %}{% for block in message['content'] %}{% if block['type'] == 'text' %}"
    "{{ block['text'] }}{% elif block['type'] in ['image', 'image_url'] %}{{ '<image>' }}{% else %}"
    "{{ raise_exception('Only text and image blocks are supported in message content!') }}{% endif %}{% endfor %}"
    "{% endif %}[/INST]{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
TEMPLATES = {"llava-hf": LLAVA_HF, "chatml": CHATML, "pixtral": PIXTRAL}  # these show images
TEXT_ONLY = {"llama3": LLAMA3, "mistral": MISTRAL}
TEMPLATE = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    return saved_hosts.save("llava", tmp_path_factory.mktemp("llava"))[0]


@pytest.fixture(scope="module")
def processor(native):
    return BTAdapterLlavaProcessor.from_pretrained(native, num_frames=4)


@pytest.fixture
def with_template(native, tmp_path):
    """(native processor, ours) of a checkpoint with this template; ours saved and loaded once more."""

    def make(template: str):
        theirs = LlavaProcessor.from_pretrained(native)
        theirs.chat_template = template
        theirs.save_pretrained(tmp_path / "native")
        saved_hosts.tiny_hosts.llava().config.save_pretrained(tmp_path / "native")
        ours = BTAdapterLlavaProcessor.from_pretrained(tmp_path / "native", num_frames=4)
        ours.save_pretrained(tmp_path / "ours")
        return theirs, BTAdapterLlavaProcessor.from_pretrained(tmp_path / "ours")

    return make


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(clip_tools.write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", count=12, fps=4))


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "a picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(path)
    return str(path)


def user(*parts) -> dict:
    return {"role": "user", "content": list(parts)}


def text(words: str = "what happens ?") -> dict:
    return {"type": "text", "text": words}


def ids_of(inputs) -> list[int]:
    return inputs["input_ids"][0].tolist()


@pytest.mark.parametrize("generation_prompt", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_hosts_own_template_is_kept_and_shows_videos(with_template, picture, clip, name, generation_prompt):
    theirs, ours = with_template(TEMPLATES[name])
    # open already: torchcodec, which the native one reads paths with, fails on PNG beside decord's zlib
    opened = Image.open(picture).convert("RGB")
    assert ours.chat_template == theirs.chat_template
    answer = "left ." if name == "pixtral" else [text("left .")]
    seen = [user({"type": "image", "image": opened}, text()), {"role": "assistant", "content": answer}]
    seen += [user(text("where ?"), {"type": "image", "image": opened})]
    options = {"add_generation_prompt": generation_prompt}
    prompt = theirs.apply_chat_template(seen, **options)
    assert ours.apply_chat_template(seen, **options) == prompt and prompt.count("<image>") == 2
    tensors = {"tokenize": True, "return_dict": True, "return_tensors": "pt", **options}
    expected, got = (p.apply_chat_template(seen, **tensors) for p in (theirs, ours))
    assert all(torch.equal(expected[key], got[key]) for key in ("input_ids", "attention_mask", "pixel_values"))
    # the first is a video now, and stands where the image stood
    seen[0]["content"][0] = {"type": "video", "path": clip}
    assert ours.apply_chat_template(seen, **options) == prompt.replace("<image>", "<video>", 1)
    inputs = ours.apply_chat_template(seen, **tensors)
    first = expected["input_ids"][0].tolist().index(IMAGE)
    assert ids_of(inputs)[first : first + PATCHES] == [VIDEO] * PATCHES
    assert ids_of(inputs)[first + PATCHES :] == expected["input_ids"][0].tolist()[first + PATCHES :]
    assert inputs["pixel_values"].shape[0] == inputs["pixel_values_videos"].shape[0] == 1


@pytest.mark.parametrize("name", [*TEMPLATES, *TEXT_ONLY])
def test_text_as_a_string_and_as_a_part(with_template, name):
    """Both are written, also where the template reads one form alone; as the native processor, where that does."""
    theirs, ours = with_template({**TEMPLATES, **TEXT_ONLY}[name])
    as_text, as_part = [{"role": "user", "content": "what happens ?"}], [user(text())]
    prompts = [ours.apply_chat_template(chat, add_generation_prompt=True) for chat in (as_text, as_part)]
    assert prompts[0] == prompts[1] and "what happens ?" in prompts[0]
    native = theirs.apply_chat_template(as_part if name in TEMPLATES else as_text, add_generation_prompt=True)
    assert prompts[0] == native


@pytest.mark.parametrize("name", TEXT_ONLY)
def test_a_template_for_text_gets_placeholders_in_front(with_template, clip, picture, name):
    theirs, ours = with_template(TEXT_ONLY[name])
    chat = [user({"type": "video", "path": clip}, {"type": "image", "path": picture}, text())]
    expected = theirs.apply_chat_template([{"role": "user", "content": "<video>\n<image>\nwhat happens ?"}])
    assert ours.apply_chat_template(chat) == expected
    inputs = ours.apply_chat_template(chat, **TEMPLATE)
    assert ids_of(inputs).count(VIDEO) == ids_of(inputs).count(IMAGE) == PATCHES


def test_a_template_that_shows_nothing_is_refused_in_words(with_template, clip):
    parts = "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    _, ours = with_template(f"{{% for message in messages %}}{parts}{{% endfor %}}")
    with pytest.raises(ValueError, match="shows no videos.*default_chat_template"):
        ours.apply_chat_template([user({"type": "video", "path": clip}, text())], **TEMPLATE)
    ours.chat_template = type(ours).default_chat_template
    assert VIDEO in ids_of(ours.apply_chat_template([user({"type": "video", "path": clip}, text())], **TEMPLATE))


def test_answers_are_found_behind_a_video_in_a_hosts_own_template(with_template, clip):
    _, ours = with_template(LLAVA_HF)
    chat = [user({"type": "video", "path": clip}, text("what does <video> do ?"))]
    chat += [{"role": "assistant", "content": [text("left .")]}]
    inputs = ours.apply_chat_template(
        [chat], **{**TEMPLATE, "add_generation_prompt": False}, return_assistant_tokens_mask=True
    )
    answer = inputs["input_ids"][0][torch.as_tensor(inputs["assistant_masks"])[0].bool()]
    assert ours.decode(answer).split() == ["left", "."]


# --------------------------------------------------------------------------------------------------- forms of messages


@dataclasses.dataclass
class Part:
    type: str
    text: str | None = None
    image: str | None = None


@dataclasses.dataclass
class Message:
    role: str
    content: list[Part] | str | None = None


class Dumped:
    """As pydantic's models."""

    def __init__(self, **fields):
        self.fields = fields

    def model_dump(self) -> dict:
        return self.fields


class Chat:
    def __init__(self, *messages):
        self.messages = list(messages)


def test_forms_of_an_image(processor, picture):
    expected = processor.apply_chat_template([user({"type": "image", "path": picture}, text())], **TEMPLATE)
    with open(picture, "rb") as file:
        encoded = base64.b64encode(file.read()).decode()
    url = f"data:image/png;base64,{encoded}"
    forms = [
        [user({"type": "image_url", "image_url": {"url": picture}}, text())],
        [user({"type": "image_url", "image_url": picture}, text())],
        [user({"type": "image", "url": "file://" + picture.replace(" ", "%20")}, text())],
        [user({"type": "image", "url": url}, text())],
        [user({"type": "image", "base64": encoded}, text())],
        [user({"type": "image", "image": Image.open(picture)}, text())],
        [
            user(
                {"type": "image", "image": picture, "url": None, "path": None, "text": None}, {**text(), "image": None}
            )
        ],
        [Message("user", [Part("image", image=picture), Part("text", "what happens ?")])],
        [Dumped(role="user", content=[{"type": "image", "image": picture}, text()], name=None)],
        [Message("user", [Part("image", image=picture), Dumped(**text())])],
    ]
    for form in forms:
        inputs = processor.apply_chat_template(form, **TEMPLATE)
        assert all(torch.equal(inputs[key], expected[key]) for key in expected), form
    inputs = processor.apply_chat_template([Chat(*forms[0]), Chat(*forms[7])], **TEMPLATE)
    assert torch.equal(inputs["input_ids"], expected["input_ids"].repeat(2, 1))
    elsewhere = processor.apply_chat_template(
        [user({"type": "image"}, text())], **TEMPLATE, processor_kwargs={"images": [Image.open(picture)]}
    )
    assert torch.equal(elsewhere["pixel_values"], expected["pixel_values"])


def test_forms_of_a_video(processor, clip):
    expected = processor.apply_chat_template([user({"type": "video", "path": clip}, text())], **TEMPLATE)
    with open(clip, "rb") as file:
        encoded = base64.b64encode(file.read()).decode()
    for part in (
        {"type": "video", "url": f"file://{clip}"},
        {"type": "video", "url": f"data:video/mp4;base64,{encoded}"},
        {"type": "video_url", "video_url": {"url": clip}},
        {"type": "video", "path": clip, "url": None, "text": None},
    ):
        inputs = processor.apply_chat_template([user(part, text())], **TEMPLATE)
        assert all(torch.equal(inputs[key], expected[key]) for key in expected), part.keys()
    again = processor.apply_chat_template(
        [user({"type": "video"}, text())], **TEMPLATE, processor_kwargs={"videos": [clip]}
    )
    assert torch.equal(again["pixel_values_videos"], expected["pixel_values_videos"])


def test_an_assistant_without_content(processor):
    chat = [{"role": "user", "content": "what ?"}, {"role": "assistant", "content": None}, user(text("where ?"))]
    assert processor.apply_chat_template(chat) == "USER: what ? ASSISTANT: </s>USER: where ? "


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"content": "what ?"}, "expected one with role"),
        ("what ?", "expected one with role"),
        ({"role": "user", "content": 3}, "expected text or a list"),
        ({"role": "user", "content": None}, "ask a question"),
        (user({"type": "image", "path": "a", "url": "b"}, text()), "with url and path"),
        (user({"type": "audio", "path": "a"}, text()), "type 'audio'"),
        (user("what ?"), "type None"),
        (user({"type": "image_url", "image_url": None}, text()), "type image_url without a url"),
        (user({"type": "image_url", "image_url": {"url": None}}, text()), "type image_url without a url"),
        (user({"type": "text", "text": 3}), "type text with 3; expected a string"),
        (user({"type": "image", "path": ""}, text()), "type image whose path is empty"),
    ],
)
def test_messages_that_are_none(processor, message, error):
    with pytest.raises(ValueError, match=error):
        processor.apply_chat_template([message], **TEMPLATE)


def test_what_spells_a_placeholder_is_text(processor, clip, picture):
    words = "what does <video> or <image> do ?"
    chat = [user({"type": "video", "path": clip}, {"type": "image", "path": picture}, text(words))]
    prompt = processor.apply_chat_template(chat)
    assert prompt == f"USER: <video>\n<image>\n{words} "
    ids = ids_of(processor.apply_chat_template(chat, **TEMPLATE))
    assert ids.count(VIDEO) == ids.count(IMAGE) == PATCHES
    plain = ids_of(processor.apply_chat_template([user(text("what does ( video ) or ( image ) do ?"))], **TEMPLATE))
    assert [i for i in ids if i not in (VIDEO, IMAGE)] == plain  # "<", "video" and ">" are unknown words like "("
    # without a visual in the message, and given as pixels beside a prompt, it is a placeholder still
    assert VIDEO not in ids_of(processor.apply_chat_template([user(text(words))], **TEMPLATE))
    inputs = processor(text="what <image> ?", images=Image.open(picture), return_tensors="pt")
    assert ids_of(inputs).count(IMAGE) == PATCHES


def test_an_image_that_cannot_be_had_is_an_error_with_its_name(processor, picture, tmp_path):
    (tmp_path / "cut.png").write_bytes(open(picture, "rb").read()[:300])
    (tmp_path / "text.png").write_text("no image")
    whole = io.BytesIO(open(picture, "rb").read()[:300])
    lazy = Image.open(whole)
    for source, name in (
        (str(tmp_path / "cut.png"), "cut.png"),
        (str(tmp_path / "text.png"), "text.png"),
        (str(tmp_path), "is not a file"),
        ("nowhere.png", "nowhere.png does not exist"),
        ("http://127.0.0.1:9/dead.png", "127.0.0.1:9/dead.png"),
        ("data:image/png;base64,AAAA", "data:image/png"),
        ("data:image/png;base64,AAA", "content is no base64"),
        (lazy, "without a name"),
    ):
        with pytest.raises(VideoError, match=name):
            processor.apply_chat_template([user({"type": "image", "image": source}, text())], **TEMPLATE)
