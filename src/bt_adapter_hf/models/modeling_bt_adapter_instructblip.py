"""InstructBLIP with a BT-Adapter: the image model, whose Q-Former takes a video as one set of tokens."""

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    InstructBlipForConditionalGeneration,
    InstructBlipPreTrainedModel,
    InstructBlipQFormerModel,
)
from transformers.models.instructblip.modeling_instructblip import (
    InstructBlipForConditionalGenerationModelOutput,
)

from .compat_bt_adapter import BaseModelOutputWithPooling, can_return_tuple
from .configuration_bt_adapter_chat import BTAdapterInstructBlipConfig
from .modeling_bt_adapter_qformer import BTAdapterQFormerChatMixin
from .modeling_bt_adapter_vision import BTAdapterVisionModel


NO_WORDS = "InstructBLIP's Q-Former reads the instruction: pass qformer_input_ids, as its processor does."


class BTAdapterInstructBlipForConditionalGeneration(BTAdapterQFormerChatMixin, InstructBlipForConditionalGeneration):
    """InstructBLIP that takes videos.

    Images take the native path, with logits equal to InstructBLIP's bit for bit. A video has `num_query_tokens`
    tokens, as an image has; both may stand in one prompt and in one batch. `vision_model` is a
    [`BTAdapterVisionModel`].
    """

    config: BTAdapterInstructBlipConfig

    def __init__(self, config: BTAdapterInstructBlipConfig):
        InstructBlipPreTrainedModel.__init__(self, config)
        config.validate()
        self.vision_model = BTAdapterVisionModel._from_config(config.vision_config)
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, config.qformer_config.hidden_size))
        self.qformer = InstructBlipQFormerModel._from_config(config.qformer_config)
        self.language_projection = nn.Linear(config.qformer_config.hidden_size, config.text_config.hidden_size)
        causal = config.use_decoder_only_language_model
        self.language_model = (AutoModelForCausalLM if causal else AutoModelForSeq2SeqLM).from_config(
            config.text_config
        )
        self.post_init()
        self.freeze_backbone()

    def _query(
        self,
        image_embeds: torch.Tensor,
        qformer_input_ids: torch.LongTensor | None = None,
        qformer_attention_mask: torch.LongTensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        if qformer_input_ids is None:
            raise ValueError(NO_WORDS)
        V, device = len(image_embeds), image_embeds.device
        queries = self.query_tokens.expand(V, -1, -1)
        if qformer_attention_mask is None:
            qformer_attention_mask = torch.ones_like(qformer_input_ids)
        ones = torch.ones(queries.shape[:2], dtype=torch.long, device=device)
        return self.qformer(
            input_ids=qformer_input_ids,
            attention_mask=torch.cat([ones, qformer_attention_mask.to(device)], dim=1),
            query_embeds=queries,
            encoder_hidden_states=image_embeds,
            encoder_attention_mask=torch.ones(image_embeds.shape[:2], dtype=torch.long, device=device),
            **{**kwargs, "return_dict": True},
        )

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        qformer_input_ids: torch.LongTensor | None = None,
        qformer_attention_mask: torch.LongTensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        frame_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        interpolate_pos_encoding: bool = False,
        backbone_states: dict[int, torch.Tensor] | None = None,
        **kwargs,
    ) -> InstructBlipForConditionalGenerationModelOutput:
        """
        Args:
            pixel_values: (images, 3, H, W), in the order of the batch.
            qformer_input_ids: (B, words), the instruction in the Q-Former's own tokens, per row of `input_ids`.
            qformer_attention_mask: (B, words).
            input_ids: (B, S), with `num_query_tokens` placeholders where an image or a video belongs.
            attention_mask: (B, S).
            pixel_values_videos: (videos, T, 3, H, W), in the order of the batch.
            frame_mask: (videos, T), nonzero = a real frame, where the videos differ in length.
            decoder_input_ids, decoder_attention_mask: for a T5 language model.
            labels: (B, S), -100 where no loss is wanted; for a T5 language model (B, answer).
            interpolate_pos_encoding: of images of another size.
            backbone_states: in place of pixel_values_videos, see [`BTAdapterVisionModel.forward`].
            kwargs: for the language model.

        Raises:
            ValueError: if placeholders and visual tokens differ in number, or the prompt is too long for the model.
        """
        visuals = (pixel_values, pixel_values_videos, frame_mask, interpolate_pos_encoding)
        seen = (pixel_values, pixel_values_videos, backbone_states)
        text = _qformer_text(qformer_input_ids, qformer_attention_mask, *seen)
        encoded = self._encode(input_ids, *visuals, text, backbone_states)
        if decoder_input_ids is not None:
            kwargs["decoder_input_ids"] = decoder_input_ids
        if decoder_attention_mask is not None:
            kwargs["decoder_attention_mask"] = decoder_attention_mask
        first = next(iter(encoded.values()), None)
        return InstructBlipForConditionalGenerationModelOutput(
            **self._answer(input_ids, encoded, attention_mask, labels, **kwargs),
            vision_outputs=None if first is None else first.vision_outputs,
            qformer_outputs=None if first is None else first.qformer_outputs,
        )

    @torch.no_grad()
    def generate(
        self,
        pixel_values: torch.FloatTensor | None = None,
        qformer_input_ids: torch.LongTensor | None = None,
        qformer_attention_mask: torch.LongTensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        frame_mask: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **generate_kwargs,
    ) -> torch.LongTensor:
        """Answers, as ids; see [`forward`] for the inputs and transformers' `generate` for `generate_kwargs`."""
        if input_ids is None:
            input_ids = self._prompt(pixel_values, pixel_values_videos)
        visuals = (pixel_values, pixel_values_videos, frame_mask, interpolate_pos_encoding)
        text = _qformer_text(qformer_input_ids, qformer_attention_mask, pixel_values, pixel_values_videos)
        encoded = self._encode(input_ids, *visuals, text)
        return self._generate(input_ids, attention_mask, encoded, **generate_kwargs)


def _qformer_text(
    input_ids: torch.LongTensor | None, attention_mask: torch.LongTensor | None, *visuals: object
) -> dict[str, torch.Tensor]:
    if input_ids is None and any(seen is not None for seen in visuals):
        raise ValueError(NO_WORDS)
    text = {"qformer_input_ids": input_ids, "qformer_attention_mask": attention_mask}
    return {key: value for key, value in text.items() if value is not None}


for _auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
    _auto.register(BTAdapterInstructBlipConfig, BTAdapterInstructBlipForConditionalGeneration, exist_ok=True)
