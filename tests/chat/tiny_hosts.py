"""Tiny random chat models with their processors, made in code: 32 pixels, 16 patches, a handful of words."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2VisionConfig,
    BlipImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from bt_adapter_hf import BTAdapterVideoProcessor


WORDS = ["what", "happens", "where", "is", "the", "red", "square", "left", "right", "USER", "ASSISTANT", ":", "?", "."]
SIZES = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 8,
    "initializer_range": 0.2,  # large enough that what is seen changes what is said; the EVA configs say 1e-10
}
PATCHES = 16


def tokenizer(extra: tuple[str, ...] = ("<image>",)) -> PreTrainedTokenizerFast:
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocab = {word: i for i, word in enumerate([*special, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokens = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokens.add_tokens(list(extra), special_tokens=True)
    return tokens


def text_config(vocab_size: int = 32) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=vocab_size,
        max_position_embeddings=192,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def image_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def video_processor(num_frames: int = 4) -> BTAdapterVideoProcessor:
    size = {"height": 32, "width": 32}
    return BTAdapterVideoProcessor(
        size={"shortest_edge": 32}, crop_size=size, num_frames=num_frames, sampling="centers"
    )


def llava(**fields) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**SIZES),
        text_config=text_config(),
        image_token_index=tokenizer().convert_tokens_to_ids("<image>"),
        **fields,
    )
    return LlavaForConditionalGeneration(config).eval()


def stir(module: torch.nn.Module, seed: int = 1) -> None:
    """Moves the branch away from its start, where its temporal part does nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = 0.01 if "gate" in name else 0.1
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def images(count: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def video(T: int = 4, seed: int = 3) -> torch.Tensor:
    return torch.randn(1, T, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def prompt(*parts: str | int, tokens: int = PATCHES) -> torch.LongTensor:
    """Ids (1, S) of "<s>" and the parts: "image" and "video" are runs of placeholders, numbers are words."""
    ids = [1]
    for part in parts:
        ids += {"image": [18] * tokens, "video": [19] * tokens}.get(part, [part])
    return torch.tensor([ids])


def left_padded(*rows: torch.LongTensor) -> dict[str, torch.LongTensor]:
    longest = max(row.shape[1] for row in rows)
    ids = torch.cat([torch.nn.functional.pad(row, (longest - row.shape[1], 0)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def right_padded(*videos: torch.Tensor) -> dict[str, torch.Tensor]:
    """Videos (1, T, 3, 32, 32) of unequal T -> pixel_values_videos and frame_mask."""
    longest = max(video.shape[1] for video in videos)
    pixels = torch.cat([torch.nn.functional.pad(v, (0, 0) * 3 + (0, longest - v.shape[1])) for v in videos])
    mask = torch.tensor([[t < video.shape[1] for t in range(longest)] for video in videos])
    return {"pixel_values_videos": pixels, "frame_mask": mask}


# ---------------------------------------------------------------------------------------------- hosts with a Q-Former

QUERIES = 4
QFORMER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


def _blip(model_class, config_class, vision_class, language_config=None):
    torch.manual_seed(0)
    config = config_class(
        vision_config=vision_class(**SIZES),
        qformer_config=QFORMER,
        text_config=language_config or text_config(),
        num_query_tokens=QUERIES,
        image_token_index=18,
    )
    model = model_class(config).eval()
    torch.nn.init.normal_(model.query_tokens)  # zero at first: all queries alike
    return model


def instructblip(language_config: PreTrainedConfig | None = None) -> InstructBlipForConditionalGeneration:
    return _blip(InstructBlipForConditionalGeneration, InstructBlipConfig, InstructBlipVisionConfig, language_config)


def blip2() -> Blip2ForConditionalGeneration:
    """What MiniGPT-4 is in transformers: a BLIP-2 with a Llama."""
    return _blip(Blip2ForConditionalGeneration, Blip2Config, Blip2VisionConfig)


def blip_image_processor() -> BlipImageProcessorPil:
    return BlipImageProcessorPil(size={"height": 32, "width": 32})
