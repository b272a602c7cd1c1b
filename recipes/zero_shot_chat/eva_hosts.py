"""The same with the two other hosts, InstructBLIP and MiniGPT-4: an EVA tower, a Q-Former, and few tokens per video.

    python -m recipes.zero_shot_chat.eva_hosts -o build/zero-shot     # about 80 minutes of one core

An EVA-CLIP of the size of the package's CLIP learns from stills and trails, and the branch is pretrained beside it,
frozen, on the clips of `build`. Then an InstructBLIP and a BLIP-2, which is what MiniGPT-4 is in transformers, learn
from stills and trails: a new Q-Former, a new projection, and the language model of the package further. They are
saved as transformers has them, and loaded with the adapter. Nothing was ever tuned on a video.

Every step leaves its files in the output folder and is skipped when they are there.
"""

import json
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    set_seed,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from bt_adapter_hf import (
    BTAdapterConfig,
    BTAdapterInstructBlipForConditionalGeneration,
    BTAdapterInstructBlipProcessor,
    BTAdapterLlavaForConditionalGeneration,
    BTAdapterMiniGPT4ForConditionalGeneration,
    BTAdapterMiniGPT4Processor,
    BTAdapterModel,
    BTAdapterProcessor,
    BTAdapterVisionModel,
    save_bt_adapter,
)
from bt_adapter_hf.assets import default_chat_model_path, default_model_path
from bt_adapter_hf.data.moving_digits import all_captions
from bt_adapter_hf.data.moving_digits_chat import conversation
from bt_adapter_hf.models.chat_templates_bt_adapter import MINIGPT4_SYSTEM

from ..moving_digits.build import IMAGE_SIZE, PATCH_SIZE, fit_clip, train_branch, write_clip_files
from ..moving_digits_chat.build import STILLS, build_tokenizer, language_config, show_still, train
from ..shared import TRAIN_SEED, make, parse_output
from .build import CLIP_BATCH, CLIP_LR, Pictures, format_scores, score_plugged, show_trail, shuffled_index, test_videos


CLIP_STEPS = 900  # half as many again as `build` has: its CLIP has seen stills before
CHAT_STEPS, CHAT_BATCH, CHAT_LR = 700, 64, 1e-3
QUERIES = 16
QFORMER = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "cross_attention_frequency": 1,
    "encoder_hidden_size": 128,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.08,  # 1 / sqrt(width)
}
HOSTS = {  # name -> the parts in transformers, ours, and its processor
    "instructblip": (
        (InstructBlipForConditionalGeneration, InstructBlipConfig, InstructBlipQFormerConfig),
        BTAdapterInstructBlipForConditionalGeneration,
        BTAdapterInstructBlipProcessor,
    ),
    "minigpt4": (
        (Blip2ForConditionalGeneration, Blip2Config, Blip2QFormerConfig),
        BTAdapterMiniGPT4ForConditionalGeneration,
        BTAdapterMiniGPT4Processor,
    ),
}


PROMPTS = {  # what a host says beside questions and answers
    "instructblip": [],
    "minigpt4": [f"{MINIGPT4_SYSTEM}###Human: <Img></Img> ###Assistant: "],
}


class EvaClip(BTAdapterModel):
    """A dual encoder that learns from (image, text). The branch takes no part."""

    def forward(self, input_ids, pixel_values, attention_mask=None, return_loss=True):
        images = self.get_image_features(pixel_values).pooler_output
        texts = self.get_text_features(input_ids, attention_mask=attention_mask).pooler_output
        images, texts = (torch.nn.functional.normalize(x, dim=-1) for x in (images, texts))
        logits = texts @ images.T * self.logit_scale.exp()
        return {"loss": image_text_contrastive_loss(logits)}


def train_clip(folder: Path) -> None:
    """An EVA-CLIP on stills and trails, which starts from what it shares with the CLIP of the package."""
    set_seed(TRAIN_SEED)
    start = AutoModel.from_pretrained(default_model_path())
    clip = start.vision_model.vision_model
    vision = InstructBlipVisionConfig(
        hidden_size=clip.config.hidden_size,
        intermediate_size=clip.config.intermediate_size,
        num_hidden_layers=clip.config.num_hidden_layers,
        num_attention_heads=clip.config.num_attention_heads,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_act=clip.config.hidden_act,
        initializer_range=0.02,
    )
    config = BTAdapterConfig(
        text_config=start.config.text_config.to_dict(),
        vision_config={"backbone": vision},
        projection_dim=start.config.projection_dim,
    )
    model = EvaClip(config)
    tower = model.vision_model.vision_model.requires_grad_(True)
    model.vision_model.bt_adapter.requires_grad_(False)
    with torch.no_grad():
        for layer, known in zip(tower.encoder.layers, clip.encoder.layers, strict=True):
            attention = known.self_attn
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            layer.self_attn.qkv.weight.copy_(torch.cat([x.weight for x in projections]))
            layer.self_attn.qkv.bias.copy_(torch.cat([x.bias for x in projections]))
            layer.self_attn.projection.load_state_dict(attention.out_proj.state_dict())
            for name in ("layer_norm1", "layer_norm2", "mlp"):
                getattr(layer, name).load_state_dict(getattr(known, name).state_dict())
        tower.embeddings.patch_embedding.weight.copy_(clip.embeddings.patch_embedding.weight)
        tower.embeddings.class_embedding.copy_(clip.embeddings.class_embedding[None, None])
        tower.embeddings.position_embedding.copy_(clip.embeddings.position_embedding.weight[None])
    model.text_model.load_state_dict(start.text_model.state_dict())
    model.text_projection.load_state_dict(start.text_projection.state_dict())
    fit_clip(
        model,
        BTAdapterProcessor.from_pretrained(default_model_path()),
        Pictures(CLIP_STEPS * CLIP_BATCH),
        folder,
        max_steps=CLIP_STEPS,
        per_device_train_batch_size=CLIP_BATCH,
        learning_rate=CLIP_LR,
    )
    # What pretraining finds no branch in gets a fresh one, started from the layers as they are now.
    path = folder / "model.safetensors"
    weights = {name: value for name, value in load_file(path).items() if ".bt_adapter." not in name}
    save_file(weights, path, metadata={"format": "pt"})


def build_host(name: str, clip_folder: Path) -> tuple[PreTrainedModel, BTAdapterInstructBlipProcessor]:
    """The host as transformers has it: the EVA tower, a new Q-Former and projection, and the known language model."""
    (model_class, config_class, qformer_class), _, processor_class = HOSTS[name]
    eva, seeing = BTAdapterModel.from_pretrained(clip_folder), BTAdapterProcessor.from_pretrained(clip_folder)
    tokens = build_tokenizer(*PROMPTS[name])
    words, reading = {}, {}
    if name == "instructblip":  # its Q-Former reads the question
        words = {"qformer_tokenizer": build_tokenizer()}
        reading = {"vocab_size": len(words["qformer_tokenizer"])}
    parts = (seeing.image_processor, seeing.video_processor, tokens)
    processor = processor_class(*parts, num_query_tokens=QUERIES, **words)
    vision = eva.vision_model.vision_model.config.to_dict()
    if name == "minigpt4":
        vision = Blip2VisionConfig(**{key: value for key, value in vision.items() if key != "model_type"})
    config = config_class(
        vision_config=vision,
        qformer_config=qformer_class(**QFORMER, **reading),
        text_config=language_config(tokens),
        num_query_tokens=QUERIES,
        image_token_index=tokens.convert_tokens_to_ids(processor.image_token),
    )
    model = model_class(config)
    torch.nn.init.normal_(model.query_tokens, std=1.0)  # zero as transformers has it, so that all would stay alike
    model.vision_model.load_state_dict(eva.vision_model.vision_model.state_dict())
    model.vision_model.requires_grad_(False)
    take_language(model.language_model, tokens)
    return model, processor


def take_language(model: PreTrainedModel, tokens: PreTrainedTokenizerFast) -> None:
    """The language model of the package in another one, whose tokenizer knows some words more."""
    known = BTAdapterLlavaForConditionalGeneration.from_pretrained(default_chat_model_path())
    ids = PreTrainedTokenizerFast.from_pretrained(default_chat_model_path()).get_vocab()
    model.model.layers.load_state_dict(known.model.language_model.layers.state_dict())
    model.model.norm.load_state_dict(known.model.language_model.norm.state_dict())
    shared = {new: ids[token] for token, new in tokens.get_vocab().items() if token in ids}
    pairs = (
        (model.model.embed_tokens, known.model.language_model.embed_tokens),
        (model.lm_head, known.lm_head),
    )
    with torch.no_grad():
        for module, other in pairs:
            shared = {new: old for new, old in shared.items() if old < len(other.weight)}
            module.weight[list(shared)] = other.weight[list(shared.values())]


class StillsAndTrails(torch.utils.data.IterableDataset):
    """An endless stream of conversations about a still and a trail by turns, of one question each.

    The Q-Former of an InstructBLIP reads the first question, and what it looks for is meant for that.
    """

    def __iter__(self) -> Iterator[list[dict]]:
        for place in range(CHAT_STEPS * CHAT_BATCH // 2):
            rng = np.random.default_rng([TRAIN_SEED, 3, place])
            still = show_still("train", TRAIN_SEED, shuffled_index(len(STILLS), place, TRAIN_SEED))
            yield conversation(*still, rng, turns=1)
            trail = show_trail("train", TRAIN_SEED, shuffled_index(len(all_captions()), place, TRAIN_SEED))
            yield conversation(*trail, rng, turns=1)


def train_chat(name: str, clip_folder: Path, folder: Path) -> None:
    set_seed(TRAIN_SEED)
    model, processor = build_host(name, clip_folder)
    train(
        model,
        processor,
        StillsAndTrails(),
        folder,
        max_steps=CHAT_STEPS,
        per_device_train_batch_size=CHAT_BATCH,
        learning_rate=CHAT_LR,
        lr_multipliers={},
    )


class FrameAveragedTower(BTAdapterVisionModel):
    """The baseline without a branch: the tokens of a video are those of its frames, averaged over time."""

    def forward(self, pixel_values, frame_mask=None, backbone_states=None, **kwargs):
        if pixel_values.ndim == 4:
            return super().forward(pixel_values, **kwargs)
        tokens = self.vision_model(pixel_values.flatten(0, 1)).last_hidden_state
        return BaseModelOutputWithPooling(tokens.unflatten(0, pixel_values.shape[:2]).mean(dim=1))


def plug_in(name: str, folder: Path, adapter: Path) -> PreTrainedModel:
    return HOSTS[name][1].from_pretrained(folder, bt_adapter=str(adapter))


def evaluate(name: str, folder: Path, adapter: Path) -> dict[str, dict[str, float]]:
    processor = HOSTS[name][2].from_pretrained(folder)
    average = plug_in(name, folder, adapter)
    average.vision_model.__class__ = FrameAveragedTower
    return score_plugged(plug_in(name, folder, adapter), average, processor, test_videos())


def main() -> None:
    output = parse_output(__doc__)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    clip_folder, clips, branch, adapter = (output / name for name in ("eva-clip", "clips", "eva", "eva-adapter"))
    results_file = output / "eva-results.json"

    def pretrain() -> None:
        train_branch(clip_folder, clips, branch)
        save_bt_adapter(BTAdapterModel.from_pretrained(branch), adapter)

    steps = [
        ("eva-clip", clip_folder / "processor_config.json", partial(train_clip, clip_folder)),
        ("clips", clips / "test" / "metadata.jsonl", partial(write_clip_files, clips)),
        ("eva-branch", adapter / "adapter_model.safetensors", pretrain),
        *(
            (name, output / name / "processor_config.json", partial(train_chat, name, clip_folder, output / name))
            for name in HOSTS
        ),
    ]
    seconds = make(steps, results_file)
    scores = {name: evaluate(name, output / name, adapter) for name in HOSTS}
    results_file.write_text(json.dumps({"seconds": seconds, "scores": scores}, indent=2) + "\n")
    print(f"seconds: {seconds}")
    for name, rows in scores.items():
        print(f"\n{name}\n{format_scores(rows)}")


if __name__ == "__main__":
    main()
