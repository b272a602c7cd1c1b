"""InstructBLIP and MiniGPT-4 with a branch: native images, videos as query tokens, batches, generation, loading."""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Blip2ForConditionalGeneration,
    InstructBlipForConditionalGeneration,
    T5Config,
)
from transformers.utils import logging as transformers_logging

from bt_adapter_hf import BTAdapterVisionModel
from bt_adapter_hf.adapters.files import AdapterError
from bt_adapter_hf.adapters.verbs import save_bt_adapter
from bt_adapter_hf.models.modeling_bt_adapter_instructblip import BTAdapterInstructBlipForConditionalGeneration
from bt_adapter_hf.models.modeling_bt_adapter_minigpt4 import (
    BTAdapterMiniGPT4ForConditionalGeneration,
    StopAtSequences,
    stop_sequences,
)
from tests.chat import tiny_hosts
from tests.chat.tiny_hosts import QUERIES, images, left_padded, right_padded, video


HOSTS = {
    "instructblip": (
        tiny_hosts.instructblip,
        InstructBlipForConditionalGeneration,
        BTAdapterInstructBlipForConditionalGeneration,
    ),
    "minigpt4": (tiny_hosts.blip2, Blip2ForConditionalGeneration, BTAdapterMiniGPT4ForConditionalGeneration),
}


class Host:
    """A native checkpoint, an adapter for it, and the model of both."""

    def __init__(self, name: str, folder):
        make, self.native_class, self.model_class = HOSTS[name]
        self.name, self.native, self.adapter = name, folder / "native", folder / "adapter"
        native = make()
        native.save_pretrained(self.native)
        tower = BTAdapterVisionModel.from_backbone(native.vision_model)
        tiny_hosts.stir(tower.bt_adapter)
        save_bt_adapter(tower, self.adapter)
        self.model = self.load()

    def load(self, **options):
        return self.model_class.from_pretrained(self.native, bt_adapter=self.adapter, **options)

    def text(self, *words: int) -> dict:
        """What the Q-Former of InstructBLIP reads, a word per row."""
        return {"qformer_input_ids": torch.tensor([[3, word] for word in words])} if "instruct" in self.name else {}


@pytest.fixture(scope="module", params=list(HOSTS))
def host(request, tmp_path_factory):
    return Host(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def log(caplog):
    transformers_logging.get_logger("bt_adapter_hf").propagate = True
    with caplog.at_level(logging.WARNING):
        yield caplog


def prompt(*parts):
    return tiny_hosts.prompt(*parts, tokens=QUERIES)


def mixed_batch(host) -> dict:
    """Row 1: an image and a video of 3 frames. Row 2: a video of 5 frames."""
    rows = left_padded(prompt("image", 4, "video", 5), prompt(4, 5, 6, "video", 7))
    return {**rows, **host.text(4, 7), "pixel_values": images(), **right_padded(video(3), video(5, seed=4))}


def generate(model, **inputs):
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "suppress_tokens": [18, 19], **inputs}
    return model.generate(**options)[:, inputs["input_ids"].shape[1] :]


# ------------------------------------------------------------------------------------------------ what it computes


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_are_bit_equal_to_the_native_host(host, dtype):
    native = host.native_class.from_pretrained(host.native, dtype=dtype)
    inputs = {**left_padded(prompt("image", 4), prompt("image", 5, 6)), **host.text(4, 5)}
    inputs["pixel_values"] = images(2).to(dtype)
    model = host.load(dtype=dtype)
    assert torch.equal(model(**inputs).logits, native(**inputs).logits)
    assert torch.equal(generate(model, **inputs), generate(native, **inputs))


@torch.no_grad()
def test_a_video_is_the_native_q_former_on_the_fused_tokens(host):
    """The native host, with its image tower replaced by the fused tokens of the video."""
    model, clip, text = host.model, video(5), host.text(4)
    native = host.native_class.from_pretrained(host.native)
    native.vision_model = model.vision_model
    expected = native.get_image_features(clip, **text, return_dict=True).pooler_output
    features = model.get_video_features(clip, **text).pooler_output
    assert torch.equal(features, expected) and features.shape == (1, QUERIES, 32)
    backwards = model.get_video_features(clip.flip(1), **text).pooler_output
    assert (features - backwards).abs().max() > 1e-3


@torch.no_grad()
def test_tokens_per_video_do_not_depend_on_frames(host):
    for T in (1, 4, 70):
        assert host.model.get_video_features(video(T), **host.text(4)).pooler_output.shape == (1, QUERIES, 32)


@torch.no_grad()
def test_placeholders_are_filled_in_order_and_read_their_own_row(host):
    model, inputs = host.model, mixed_batch(host)
    embed = model.get_input_embeddings()
    image = model.get_image_features(inputs["pixel_values"], **host.text(4), return_dict=True).pooler_output[0]
    short = model.get_video_features(video(3), **host.text(4)).pooler_output[0]
    long = model.get_video_features(video(5, seed=4), **host.text(7)).pooler_output[0]
    word = {i: embed(torch.tensor([i])) for i in (0, 1, 4, 5, 6, 7)}
    first = torch.cat([word[1], image, word[4], short, word[5]])
    second = torch.cat([word[1], word[4], word[5], word[6], long, word[7]])
    second = torch.cat([word[0].expand(len(first) - len(second), -1), second])
    reference = model.language_model(
        inputs_embeds=torch.stack([first, second]), attention_mask=inputs["attention_mask"]
    ).logits
    torch.testing.assert_close(model(**inputs).logits, reference, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_batch_of_unequal_videos_answers_as_each_alone(host):
    clips = [video(T, seed=T) for T in (4, 8, 13)]
    prompts = [prompt("video", 4), prompt(4, 5, 6, "video", 7), prompt(5, "video", 6)]
    batch = {**left_padded(*prompts), **right_padded(*clips), **host.text(4, 7, 6)}
    together, answers = host.model(**batch).logits, generate(host.model, **batch)
    for row, (ids, clip, word) in enumerate(zip(prompts, clips, (4, 7, 6), strict=True)):
        alone = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": clip}
        alone |= host.text(word)
        torch.testing.assert_close(together[row, -ids.shape[1] :], host.model(**alone).logits[0], atol=1e-5, rtol=0)
        assert torch.equal(answers[row], generate(host.model, **alone)[0])


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
def test_generation_with_cache_equals_generation_without(host, options):
    answers = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        answers.append(generate(host.model, **mixed_batch(host), **options, use_cache=use_cache))
    assert answers[0].shape == (2 * options.get("num_return_sequences", 1), 6)
    assert torch.equal(*answers)


@torch.no_grad()
def test_placeholders_beyond_the_vocabulary(host):
    far = host.load(image_token_index=98, video_token_index=99)
    inputs = mixed_batch(host)
    ids = inputs["input_ids"]
    moved = {**inputs, "input_ids": ids.masked_fill(ids == 18, 98).masked_fill(ids == 19, 99)}
    assert torch.equal(far(**moved).logits, host.model(**inputs).logits)
    # penalties index the vocabulary by the ids of the prompt
    answer = generate(far, **moved, repetition_penalty=1.2)
    assert answer.shape == (2, 6)


@torch.no_grad()
def test_without_a_prompt_each_visual_gets_an_answer(host):
    native = host.native_class.from_pretrained(host.native)
    inputs = {"pixel_values": images(2), **host.text(4, 5), "max_new_tokens": 4}
    assert torch.equal(host.model.generate(**inputs), native.generate(**inputs))
    assert len(host.model.generate(pixel_values_videos=video(), **host.text(4), max_new_tokens=4)) == 1
    with pytest.raises(ValueError, match="either images or videos"):
        host.model.generate(pixel_values=images(), pixel_values_videos=video(), **host.text(4))


def test_every_trainable_parameter_has_a_gradient(host):
    model = host.load().train()
    assert model.vision_model.bt_adapter.output_gate is None
    assert not any(p.requires_grad for p in model.vision_model.vision_model.parameters())
    inputs = {"input_ids": prompt("video", 4, 5), "pixel_values_videos": video(4), **host.text(4)}
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == 19, -100)
    model(**inputs, labels=labels).loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    learned = [p.grad.abs().sum() > 0 for name, p in model.vision_model.bt_adapter.named_parameters()]
    assert sum(learned) > 0.9 * len(learned)  # the key biases are without effect


# ---------------------------------------------------------------------------------------------------- loading routes


def bit_equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_an_adapter_brings_its_tensors(host, log):
    state = load_file(host.adapter / "bt_adapter.safetensors")
    ours = host.load().vision_model.bt_adapter.state_dict()
    assert ours.keys() == state.keys() - {"output_gate"}
    assert all(torch.equal(ours[key], state[key]) for key in ours)
    assert "newly initialised" not in log.text


def test_a_native_checkpoint_gets_a_warm_started_branch(host, log):
    model, info = host.model_class.from_pretrained(host.native, output_loading_info=True)
    assert info["missing_keys"] and all(".bt_adapter." in key for key in info["missing_keys"])
    assert model.vision_model.config.adapter_layers == [2, 3, 4]
    assert "holds no vision_model.bt_adapter" in log.text
    layer, source = model.vision_model.bt_adapter.layers[2], model.vision_model.vision_model.encoder.layers[4]
    assert torch.equal(layer.spatial.mlp.fc1.weight, source.mlp.fc1.weight)


def test_saves_and_reloads_by_itself(host, tmp_path):
    host.model.save_pretrained(tmp_path)
    native = load_file(host.native / "model.safetensors")
    saved = load_file(tmp_path / "model.safetensors")
    assert all("bt_adapter" in key for key in saved.keys() - native.keys())
    assert bit_equal(native, {key: saved[key] for key in native})
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(again) is host.model_class and bit_equal(again.state_dict(), host.model.state_dict())
    state = {key: value for key, value in saved.items() if "bt_adapter" not in key}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="missing from the checkpoint"):
        host.model_class.from_pretrained(tmp_path)


def test_an_adapter_saved_from_the_host_comes_back(host, tmp_path):
    save_bt_adapter(host.model, tmp_path, extra_modules=["language_projection"])
    model = host.model_class.from_pretrained(host.native, bt_adapter=tmp_path)
    assert bit_equal(model.state_dict(), host.model.state_dict())


def test_a_branch_for_one_layer_more_is_attached_with_its_first_layers(host, tmp_path, log):
    """The released EVA branch is for 40 layers, and the towers of BLIP-2 have 39 of them."""
    native = HOSTS[host.name][0]().vision_model
    tower = type(native)(type(native.config)(**{**native.config.to_dict(), "num_hidden_layers": 6}))
    tower.load_state_dict(native.state_dict(), strict=False)
    tower = BTAdapterVisionModel.from_backbone(tower, fusion="sum", output_fusion="sum")
    tiny_hosts.stir(tower.bt_adapter)
    save_bt_adapter(tower, tmp_path)
    model = host.model_class.from_pretrained(host.native, bt_adapter=tmp_path)
    assert model.vision_model.config.adapter_layers == [2, 3, 4]
    assert "first 3 branch layers" in log.text
    ours, state = model.vision_model.bt_adapter.state_dict(), tower.bt_adapter.state_dict()
    assert ours.keys() == {key for key in state if not key.startswith("layers.3.")}
    assert all(torch.equal(ours[key], state[key]) for key in ours)


def test_adapters_of_other_towers_are_refused(host, tmp_path):
    other = HOSTS[host.name][0]()
    with torch.no_grad():
        for parameter in other.vision_model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    other.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="not those that .* was trained on"):
        host.model_class.from_pretrained(tmp_path, bt_adapter=host.adapter)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:The following device_map keys")  # of accelerate, about a bare parameter
def test_language_model_on_the_disk(host, tmp_path):
    device_map = dict.fromkeys(("vision_model", "query_tokens", "qformer", "language_projection"), "cpu")
    loaded = host.load(device_map={**device_map, "language_model": "disk"}, offload_folder=tmp_path)
    assert any(parameter.is_meta for parameter in loaded.language_model.parameters())
    inputs = mixed_batch(host)
    torch.testing.assert_close(loaded(**inputs).logits, host.model(**inputs).logits)
    assert torch.equal(generate(loaded, **inputs), generate(host.model, **inputs))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": prompt("video", "video"), "pixel_values_videos": video()}, "8 video tokens .* 1 videos with 4"),
        ({"input_ids": prompt("video", 4)}, "4 video tokens .* 0 videos"),
        ({"input_ids": prompt("image", 4)}, "4 image tokens .* 0 images"),
        ({"input_ids": prompt("video", 4), "pixel_values_videos": video()[0]}, r"expected \(V, T, 3, H, W\)"),
    ],
)
def test_bad_input_is_refused_before_any_generation(host, inputs, message):
    if inputs.get("pixel_values_videos", video()).ndim == 4:
        inputs = {**inputs, "input_ids": prompt(*["video"] * len(inputs["pixel_values_videos"]))}
    for call in (host.model, host.model.generate):
        with pytest.raises(ValueError, match=message):
            call(**inputs, **host.text(4))


# ------------------------------------------------------------------------------------------------------ InstructBLIP


def test_instructblip_needs_an_instruction_per_row(tmp_path):
    host = Host("instructblip", tmp_path)
    inputs = {"input_ids": prompt("video", 4), "pixel_values_videos": video()}
    with pytest.raises(ValueError, match="pass qformer_input_ids"):
        host.model(**inputs)
    with pytest.raises(ValueError, match="qformer_input_ids has 2 rows, and input_ids has 1"):
        host.model(**inputs, **host.text(4, 5))


@torch.no_grad()
def test_instructblip_with_t5(tmp_path):
    """The other language model of InstructBLIP, an encoder and decoder."""
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 32}
    native = tiny_hosts.instructblip(T5Config(**sizes, decoder_start_token_id=0))
    native.save_pretrained(tmp_path)
    model = BTAdapterInstructBlipForConditionalGeneration.from_pretrained(tmp_path)
    text = {"qformer_input_ids": torch.tensor([[3, 4]])}
    inputs = {"input_ids": prompt("image", 4), "pixel_values": images(), **text}
    answer = torch.tensor([[5, 6, 7]])
    assert torch.equal(model(**inputs, labels=answer).logits, native(**inputs, labels=answer).logits)
    assert torch.equal(model(**inputs, labels=answer).loss, native(**inputs, labels=answer).loss)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4), native.generate(**inputs, max_new_tokens=4))
    inputs = {"input_ids": prompt("video", 4), "pixel_values_videos": video(), **text}
    assert model(**inputs, labels=answer).logits.shape == (1, 3, 32)
    assert len(model.generate(**inputs, max_new_tokens=4, num_beams=2)) == 1


# --------------------------------------------------------------------------------------------------------- MiniGPT-4


@pytest.fixture(scope="module")
def components(tmp_path_factory):
    """BLIP-2, a Llama with its tokenizer, and a file like the authors'."""
    folder = tmp_path_factory.mktemp("components")
    tiny_hosts.blip2().save_pretrained(folder / "blip2")
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(tiny_hosts.text_config()).save_pretrained(folder / "llama")
    tokens = tiny_hosts.tokenizer(extra=())
    tokens.add_tokens(["###"])
    tokens.save_pretrained(folder / "llama")
    state = {"llama_proj.weight": torch.randn(32, 16), "llama_proj.bias": torch.randn(32)}
    torch.save({"model": state}, folder / "minigpt4.pth")
    return folder


def assemble(components, **options):
    return BTAdapterMiniGPT4ForConditionalGeneration.from_components(
        **{
            "vision_qformer": components / "blip2",
            "language_model": components / "llama",
            "projection": components / "minigpt4.pth",
            **options,
        }
    )


def test_minigpt4_from_components(components, tmp_path):
    model = assemble(components)
    blip2 = load_file(components / "blip2" / "model.safetensors")
    llama = load_file(components / "llama" / "model.safetensors")
    state = model.state_dict()
    for key, value in blip2.items():
        if not key.startswith("language_"):
            ours = key.replace("vision_model.", "vision_model.vision_model.")
            assert torch.equal(state[ours], value), key
    for key, value in llama.items():
        assert torch.equal(state[f"language_model.{key}"], value), key
    projection = torch.load(components / "minigpt4.pth", weights_only=True)["model"]["llama_proj.weight"]
    assert torch.equal(model.language_projection.weight, projection)
    assert (model.config.image_token_id, model.config.video_token_id) == (19, 20)

    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(again) is BTAdapterMiniGPT4ForConditionalGeneration and bit_equal(again.state_dict(), state)
    assert again.generation_config.stop_sequences == [[18]]
    inputs = {"input_ids": torch.tensor([[1, *[20] * QUERIES, 5]]), "pixel_values_videos": video()}
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)


def test_the_final_norm_of_minigpt4_has_its_own_epsilon(components):
    tower = assemble(components).vision_model.vision_model
    assert tower.post_layernorm.eps == 1e-5 and tower.encoder.layers[0].layer_norm1.eps == 1e-6
    # a native BLIP-2 has one for all
    model = BTAdapterMiniGPT4ForConditionalGeneration.from_pretrained(components / "blip2")
    assert model.vision_model.vision_model.post_layernorm.eps == 1e-6


def test_minigpt4_with_an_adapter(components, tmp_path):
    blip2 = tiny_hosts.blip2()
    tower = BTAdapterVisionModel.from_backbone(blip2.vision_model)
    tiny_hosts.stir(tower.bt_adapter)
    save_bt_adapter(tower, tmp_path / "adapter")
    ours = assemble(components, bt_adapter=tmp_path / "adapter").vision_model.bt_adapter.state_dict()
    state = tower.bt_adapter.state_dict()
    assert ours.keys() == state.keys() - {"output_gate"}
    assert all(torch.equal(ours[key], state[key]) for key in ours)
    torch.nn.init.normal_(blip2.vision_model.embeddings.patch_embedding.weight)
    blip2.save_pretrained(tmp_path / "blip2")
    with pytest.raises(AdapterError, match="not those that"):
        assemble(components, vision_qformer=tmp_path / "blip2", bt_adapter=tmp_path / "adapter")


def test_minigpt4_components_that_do_not_fit(components, tmp_path):
    torch.save({"model": {"llama_proj.weight": torch.zeros(8, 16), "llama_proj.bias": torch.zeros(8)}}, tmp_path / "a")
    with pytest.raises(ValueError, match=r"is \(8, 16\).*need \(32, 16\)"):
        assemble(components, projection=tmp_path / "a")
    torch.save({"model": {"weight": torch.zeros(8, 16)}}, tmp_path / "b")
    with pytest.raises(ValueError, match="not one of MiniGPT-4's files"):
        assemble(components, projection=tmp_path / "b")
    state = load_file(components / "blip2" / "model.safetensors")
    (tmp_path / "blip2").mkdir()
    (tmp_path / "blip2" / "config.json").write_text((components / "blip2" / "config.json").read_text())
    state = {key: value for key, value in state.items() if key != "query_tokens"}
    save_file(state, tmp_path / "blip2" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 tensors missing(.|\n)*query_tokens"):
        assemble(components, vision_qformer=tmp_path / "blip2")


@torch.no_grad()
def test_minigpt4_stops_each_row_at_its_own_end(components):
    model = assemble(components)
    inputs = {"input_ids": torch.tensor([[1, *[20] * QUERIES, 5], [1, *[20] * QUERIES, 6]])}
    inputs["pixel_values_videos"] = torch.cat([video(3), video(3, seed=9)])
    free = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8)[:, 6:]
    end = int(free[0, 2])
    model.generation_config.stop_sequences = [[end], [99, 98]]
    stopped = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8)[:, 6:]  # both without an end of their own
    for row in range(2):
        answer = free[row].tolist()
        cut = answer.index(end) + 1 if end in answer else 8
        assert stopped[row, :cut].tolist() == answer[:cut]
        assert all(i == 0 for i in stopped[row, cut:].tolist())


def test_stop_sequences():
    tokens = tiny_hosts.tokenizer(extra=("###",))
    assert stop_sequences(tokens) == [[18]]
    criterion = StopAtSequences([[7], [5, 6]], prompt_length=2)
    ids = torch.tensor([[5, 6, 1, 7], [5, 6, 5, 6], [7, 7, 6, 5]])
    assert criterion(ids, None).tolist() == [True, True, False]
    assert criterion(ids[:, :2], None).tolist() == [False, False, False]
