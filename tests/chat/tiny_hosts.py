"""Tiny random chat models with their processors, made in code: 32 pixels, 16 patches, a handful of words."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
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
