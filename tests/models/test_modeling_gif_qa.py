"""GIF question answering: groups of frames, connectors, language models, batches, saving."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, pipeline

from benchmarks.gif_qa_sizes import sizes
from bt_adapter_hf import BTAdapterGifQAForConditionalGeneration, BTAdapterGifQAProcessor
from tests.chat import tiny_gif_qa
from tests.chat.tiny_hosts import right_padded, video


CONNECTORS = ("mlp", "attention", "qformer")


def ask(processor, gifs, texts):
    chats = [
        [{"role": "user", "content": [{"type": "video", "path": str(gif)}, {"type": "text", "text": text}]}]
        for gif, text in zip(gifs, texts, strict=True)
    ]
    return processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )


@torch.no_grad()
@pytest.mark.parametrize("connector", CONNECTORS)
def test_groups_of_frames(connector):
    model = tiny_gif_qa.model(connector)
    one = video(4)
    whole = model.get_video_features(one).pooler_output[0]
    assert whole.shape == (4 if connector == "mlp" else 3, 32)
    # a GIF of the tower's own number of frames is one group, and the same as without any grouping
    plain = model.language_projection(model.vision_model(one).last_hidden_state)[0]
    torch.testing.assert_close(whole, plain, rtol=0, atol=0)
    # ten frames are groups of 4, 4 and 2, each by itself
    ten = video(10, seed=5)
    found = model.get_video_features(ten).pooler_output[0]
    parts = [model.get_video_features(ten[:, start : start + 4]).pooler_output[0] for start in (0, 4, 8)]
    assert len(found) == (10 if connector == "mlp" else 9)
    torch.testing.assert_close(found, torch.cat(parts))
    # and frames that are padding change nothing, whatever is in them
    batch = right_padded(one, ten)
    batch["pixel_values_videos"][0, 4:] = torch.nan
    together = model.get_video_features(**batch).pooler_output
    torch.testing.assert_close(together[0], whole)
    torch.testing.assert_close(together[1], found)
    ungrouped = tiny_gif_qa.model(connector, group_frames=False)
    torch.testing.assert_close(ungrouped.get_video_features(one).pooler_output[0], whole, rtol=0, atol=0)
    for T in (8, 3):
        with pytest.raises(ValueError, match=rf"have {T} frames, and this X-CLIP takes 4: set num_frames=4"):
            ungrouped.get_video_features(video(T))


@torch.no_grad()
@pytest.mark.parametrize(
    "connector, language, tower",
    [
        ("mlp", "llama", "xclip"), ("attention", "qwen2", "xclip"), ("qformer", "gpt2", "xclip"),
        ("mlp", "gpt2", "bt"), ("attention", "llama", "bt"), ("qformer", "qwen2", "bt"),
    ],
)  # fmt: skip
def test_batches_answer_as_one_by_one(connector, language, tower, tmp_path):
    model = tiny_gif_qa.model(connector, language, tower)
    processor = tiny_gif_qa.processor(model.config)
    gifs = [tiny_gif_qa.write_gif(tmp_path / f"{n}.gif", frames=n + 1, seed=n) for n in range(3)]  # one still
    texts = ["what happens ?", "where is the red square ? left right left right", "red ?"]
    for options in ({"do_sample": False}, {"num_beams": 3, "do_sample": False}):
        options |= {"max_new_tokens": 5, "pad_token_id": 0}
        batch = ask(processor, gifs, texts)
        length = batch["input_ids"].shape[1]
        assert (batch["attention_mask"][:, 0] == 0).any()  # padded on the left
        together = model.generate(**batch, **options)[:, length:]
        for row in range(3):
            single = ask(processor, gifs[row : row + 1], texts[row : row + 1])
            alone = model.generate(**single, **options)[0, single["input_ids"].shape[1] :]
            assert together[row, : len(alone)].tolist() == alone.tolist()
    other = ask(processor, gifs[::-1], texts)
    assert model(**other).logits.sub(model(**batch).logits).abs().max() > 1e-3  # what is seen matters


@torch.no_grad()
def test_saved_loaded_and_in_a_pipeline(tmp_path):
    parts = tiny_gif_qa.save_components(tmp_path)
    model = BTAdapterGifQAForConditionalGeneration.from_components(**parts, connector="attention", num_query_tokens=3)
    processor = BTAdapterGifQAProcessor.from_components(model.config, **parts)
    assert model.config.video_token_id == processor.video_token_id
    assert not any(p.requires_grad for p in model.vision_model.parameters())
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "model").eval()
    reader = AutoProcessor.from_pretrained(tmp_path / "model")
    assert type(again) is BTAdapterGifQAForConditionalGeneration and type(reader) is BTAdapterGifQAProcessor
    gif = tiny_gif_qa.write_gif(tmp_path / "a.gif")
    inputs = ask(reader, [gif], ["what happens ?"])
    torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)
    with pytest.raises(ValueError, match="does not fit"):  # a tower or connector of another kind
        BTAdapterGifQAForConditionalGeneration.from_pretrained(tmp_path / "model", connector="mlp")
    chat = [{"role": "user", "content": [{"type": "video", "path": str(gif)}, {"type": "text", "text": "red ?"}]}]
    answer = pipeline("image-text-to-text", model=again, processor=reader)(
        text=chat, max_new_tokens=4, return_full_text=False
    )
    assert isinstance(answer[0]["generated_text"], str)


def test_bad_configs_and_prompts(tmp_path):
    with pytest.raises(StrictDataclassError, match="connector='linear' must be one of 'mlp', 'attention', 'qformer'"):
        tiny_gif_qa.model("linear")
    with pytest.raises(StrictDataclassError, match="width 24, and those of the tower are 16 wide"):
        tiny_gif_qa.model("qformer", qformer_config={**tiny_gif_qa.QFORMER, "encoder_hidden_size": 24})
    processor = tiny_gif_qa.processor(tiny_gif_qa.model().config)
    with pytest.raises(ValueError, match="asks about no GIF"):
        processor(text="what happens ?")
    gif = tiny_gif_qa.write_gif(tmp_path / "a.gif")
    with pytest.raises(ValueError, match="about GIFs and videos, and an image was passed"):
        processor(images=[tmp_path / "x.png"], text="<image> what ?")
    (tmp_path / "broken.gif").write_bytes(gif.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"videos\[1\]"):
        processor(videos=[str(gif), str(tmp_path / "broken.gif")], text=["<video> what ?", "<video> where ?"])


@torch.no_grad()
def test_a_tokenizer_without_a_padding_token(tmp_path):
    """As GPT-2's and Llama's: it pads with what ends a text, and what is padded is masked."""
    parts = tiny_gif_qa.save_components(tmp_path, "gpt2")
    config = json.loads((tmp_path / "llm" / "tokenizer_config.json").read_text())
    (tmp_path / "llm" / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": None}))
    assert AutoTokenizer.from_pretrained(tmp_path / "llm").pad_token is None
    model = BTAdapterGifQAForConditionalGeneration.from_components(**parts)
    processor = BTAdapterGifQAProcessor.from_components(model.config, **parts)
    assert processor.tokenizer.pad_token == processor.tokenizer.eos_token
    gif = tiny_gif_qa.write_gif(tmp_path / "a.gif")
    batch = ask(processor, [gif, gif], ["what ?", "where is the red square ?"])
    alone = ask(processor, [gif], ["what ?"])
    assert (batch["attention_mask"][0] == 0).any()
    together, single = (model.generate(**inputs, max_new_tokens=4, do_sample=False) for inputs in (batch, alone))
    assert together[0, -4:].tolist() == single[0, -4:].tolist()


@torch.no_grad()
def test_a_processor_of_another_connector():
    processor = tiny_gif_qa.processor(tiny_gif_qa.model("mlp").config)  # four tokens, and not three
    inputs = processor(videos=[video(4)[0]], text="<video> what ?", do_rescale=False, return_tensors="pt")
    with pytest.raises(ValueError, match=r"4 .*3"):
        tiny_gif_qa.model("attention")(**inputs)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # peft asks for it
def test_the_size_before_a_llama_of_3_billion():
    found = sizes("mlp")  # on the meta device
    assert found["parameters"] == pytest.approx(3.35e9, rel=0.01)  # 3.21 of Llama 3.2 3B, 0.13 of X-CLIP
    assert found["trained"] / found["parameters"] < 0.011
    assert found["weights"] < 2.6e9 < 3.2e9 > found["tuning"] and found["full"] > 16 * 3.2e9


@pytest.mark.parametrize("connector, tokens", [("mlp", 6), ("attention", 6), ("qformer", 6)])
def test_the_processor_counts_the_tokens_of_groups(connector, tokens, tmp_path):
    model = tiny_gif_qa.model(connector)
    processor = tiny_gif_qa.processor(model.config, num_frames=6)
    inputs = ask(processor, [tiny_gif_qa.write_gif(tmp_path / "a.gif")], ["what ?"])
    assert (inputs["input_ids"] == processor.video_token_id).sum() == tokens
    assert torch.isfinite(model(**inputs).logits).all()
    short = processor(
        videos=[video(2)[0], video(5)[0]], text=["<video> what ?", "<video> red ?"], do_sample_frames=False,
        do_rescale=False, return_tensors="pt",
    )  # fmt: skip
    counts = (short["input_ids"] == processor.video_token_id).sum(dim=1).tolist()
    assert counts == ([2, 5] if connector == "mlp" else [3, 6])
    assert torch.isfinite(model(**short).logits).all()
