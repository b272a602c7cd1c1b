"""LLaVA with a BT-Adapter: images as before, and videos as one image's number of tokens."""

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaPreTrainedModel,
)
from transformers.models.llava.modeling_llava import (
    LlavaCausalLMOutputWithPast,
    LlavaModelOutputWithPast,
    LlavaMultiModalProjector,
)

from .compat_bt_adapter import (
    BaseModelOutputWithPooling,
    can_return_tuple,
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from .configuration_bt_adapter_chat import BTAdapterLlavaConfig
from .modeling_bt_adapter_chat import (
    BTAdapterChatMixin,
    check_frames,
    check_length,
    check_placeholders,
    embed_text,
    put_in_place,
)
from .modeling_bt_adapter_vision import BTAdapterVisionModel


class BTAdapterLlavaModel(LlavaModel):
    """LLaVA without its language head. `vision_tower` is a [`BTAdapterVisionModel`]."""

    config: BTAdapterLlavaConfig
    input_modalities = ("image", "video", "text")

    def __init__(self, config: BTAdapterLlavaConfig):
        # As the native one, which asks AutoModel for the tower: code that came with a checkpoint is not known there.
        LlavaPreTrainedModel.__init__(self, config)
        self.vision_tower = BTAdapterVisionModel._from_config(config.vision_config)
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_video_features(
        self,
        pixel_values_videos: torch.FloatTensor | None = None,
        frame_mask: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        backbone_states: dict[int, torch.Tensor] | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Videos (V, T, 3, H, W), or the backbone_states of [`BTAdapterVisionModel.forward`], and frame_mask (V, T) ->
        output of the tower.

        `pooler_output` is a list of V tensors (tokens, width of the language model), as many tokens as an image has.

        Raises:
            ValueError: if the videos are not 5-D.
        """
        if backbone_states is not None:
            kwargs["backbone_states"] = backbone_states
        elif pixel_values_videos.ndim != 5:
            raise ValueError(
                f"pixel_values_videos has shape {tuple(pixel_values_videos.shape)}; expected (V, T, 3, H, W). Images "
                "are passed as pixel_values."
            )
        seen = pixel_values_videos if backbone_states is None else next(iter(backbone_states.values()))
        check_frames(self.config, seen.shape[1])
        if frame_mask is not None:
            kwargs["frame_mask"] = frame_mask
        return self.get_image_features(
            pixel_values=pixel_values_videos,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            **kwargs,
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        frame_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        backbone_states: dict[int, torch.Tensor] | None = None,
        answer_length: int = 0,
        **kwargs,
    ) -> LlavaModelOutputWithPast:
        """See [`BTAdapterLlavaForConditionalGeneration.forward`]."""
        encoded = dict(mm_encoder_outputs or {})
        select = {
            "vision_feature_layer": vision_feature_layer,
            "vision_feature_select_strategy": vision_feature_select_strategy,
        }
        prompt = input_ids if input_ids is not None else inputs_embeds
        if prompt is not None:
            check_length(self.config, prompt.shape[1])
        has_videos = pixel_values_videos is not None or backbone_states is not None
        if not has_videos and encoded.get("video") is None and not answer_length:
            if input_ids is not None and input_ids.shape[1] > 1:  # a step of generation has no placeholder
                check_placeholders(input_ids, self.config.video_token_id, 0, 0, "video")
            return super().forward(
                input_ids=input_ids,
                pixel_values=pixel_values,
                inputs_embeds=inputs_embeds,
                mm_encoder_outputs=mm_encoder_outputs,
                **select,
                **kwargs,
            )

        if input_ids is None or inputs_embeds is not None:
            raise ValueError("Videos find their places by the placeholders in input_ids: pass it, not inputs_embeds.")
        if encoded and (pixel_values is not None or has_videos):
            raise ValueError("Pass pixel values or mm_encoder_outputs, not both.")
        if pixel_values is not None:
            encoded["image"] = self.get_image_features(pixel_values=pixel_values, return_dict=True, **select)
        if has_videos:
            encoded["video"] = self.get_video_features(
                pixel_values_videos, frame_mask, backbone_states=backbone_states, return_dict=True, **select
            )
        inputs_embeds = embed_text(self.get_input_embeddings(), input_ids, self.config.text_config.vocab_size)
        length = input_ids.shape[1] - answer_length
        if length <= 0:
            return super().forward(inputs_embeds=inputs_embeds, **kwargs)
        places = torch.cat([input_ids[:, :length], torch.full_like(input_ids[:, length:], -1)], dim=1)
        for kind, token_id in (("image", self.config.image_token_id), ("video", self.config.video_token_id)):
            output = encoded.get(kind)
            features = [] if output is None else output.pooler_output
            inputs_embeds = put_in_place(inputs_embeds, places, token_id, features, kind)
        return super().forward(inputs_embeds=inputs_embeds, **kwargs)


class BTAdapterLlavaForConditionalGeneration(BTAdapterChatMixin, LlavaForConditionalGeneration):
    """LLaVA that takes videos.

    Images take the native path, with logits equal to LLaVA's bit for bit. A video has as many tokens as an image,
    whatever its number of frames. Both may stand in one conversation and in one batch.
    """

    config: BTAdapterLlavaConfig
    input_modalities = ("image", "video", "text")

    def __init__(self, config: BTAdapterLlavaConfig):
        LlavaPreTrainedModel.__init__(self, config)
        config.validate()
        self.model = BTAdapterLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_video_features(
        self, pixel_values_videos: torch.FloatTensor | None = None, frame_mask: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """See [`BTAdapterLlavaModel.get_video_features`]."""
        return self.model.get_video_features(pixel_values_videos, frame_mask=frame_mask, **kwargs)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        frame_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        backbone_states: dict[int, torch.Tensor] | None = None,
        answer_length: int = 0,
        **kwargs,
    ) -> LlavaCausalLMOutputWithPast:
        """
        Args:
            input_ids: (B, S), with a run of placeholders where an image or a video belongs.
            pixel_values: (images, 3, H, W), in the order of the batch.
            pixel_values_videos: (videos, T, 3, H, W), in the order of the batch.
            frame_mask: (videos, T), nonzero = a real frame, where the videos differ in length.
            attention_mask: (B, S).
            labels: (B, S), -100 where no loss is wanted.
            mm_encoder_outputs: features computed before, under "image" and "video", in place of pixel values.
            backbone_states: in place of pixel_values_videos, see [`BTAdapterVisionModel.forward`].
            answer_length: so many ids at the end are an answer so far, in which no id is a placeholder.
            kwargs: as in `LlavaForConditionalGeneration`.

        Raises:
            ValueError: if placeholders and visual tokens differ in number, or the prompt is too long for the model.
        """
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            frame_mask=frame_mask,
            attention_mask=attention_mask,
            labels=labels,
            mm_encoder_outputs=mm_encoder_outputs,
            backbone_states=backbone_states,
            answer_length=answer_length,
            **kwargs,
        )

    def generate(self, inputs: torch.LongTensor | None = None, **kwargs):
        """As in transformers. Only the prompt has placeholders, whatever ids the language model says."""
        input_ids = kwargs.get("input_ids", inputs)
        if input_ids is not None and isinstance(kwargs.get("assistant_model", self), BTAdapterChatMixin):
            kwargs.setdefault("prompt_length", input_ids.shape[1])  # a native assistant would not know what it is
        return super().generate(inputs, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids,
        cache=None,
        past_key_values=None,  # its name before transformers 5.24
        inputs_embeds=None,
        is_first_iteration: bool = False,
        prompt_length: int | None = None,
        **kwargs,
    ):
        # by name: `generate` looks at these for what it may be given
        given = {"cache": cache, "past_key_values": past_key_values, "inputs_embeds": inputs_embeds}
        kwargs |= {name: value for name, value in given.items() if value is not None}
        cache = past_key_values if cache is None else cache
        # An assistant's first step is the first of its cache; it is shown images and videos as well.
        is_first_iteration = is_first_iteration or cache is None or cache.get_seq_length() == 0
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        if not is_first_iteration and inputs.get("input_ids") is not None:
            inputs["answer_length"] = inputs["input_ids"].shape[1]
        elif prompt_length is not None:
            inputs["answer_length"] = max(0, input_ids.shape[1] - prompt_length)
        return inputs


# Native renamings hold for native classes only; LLaVA's own, for old and new key names, serve ours as well.
for _ours, _native in (("bt_adapter_llava", "llava"), ("BTAdapterLlavaModel", "LlavaModel")):
    register_checkpoint_conversion_mapping(_ours, get_checkpoint_conversion_mapping(_native), overwrite=True)

AutoModel.register(BTAdapterLlavaConfig, BTAdapterLlavaModel, exist_ok=True)
for _auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
    _auto.register(BTAdapterLlavaConfig, BTAdapterLlavaForConditionalGeneration, exist_ok=True)
