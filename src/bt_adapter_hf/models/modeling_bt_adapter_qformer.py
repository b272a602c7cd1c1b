"""What the chat models with a Q-Former share: the same few query tokens per image or video, anywhere in a prompt."""

from typing import Any

import torch
from transformers.models.blip_2.modeling_blip_2 import BaseModelOutputWithVisionQformerOutputs

from .compat_bt_adapter import BaseModelOutputWithPooling, can_return_tuple
from .modeling_bt_adapter_chat import (
    BTAdapterChatMixin,
    check_frames,
    check_length,
    check_placeholders,
    embed_text,
    put_in_place,
)


class BTAdapterQFormerChatMixin(BTAdapterChatMixin):
    """A BLIP-2, or one of its kind, with a BT-Adapter tower as `vision_model`."""

    input_modalities = ("image", "video", "text")

    def train(self, mode: bool = True):
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.qformer.parameters()):
            self.qformer.eval()  # no dropout where nothing is learned, as in the tower
        return self

    def _query(self, image_embeds: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """Runs the Q-Former on the tokens (V, C+N, D) of the tower and, where it reads text, that."""
        raise NotImplementedError

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: torch.FloatTensor | None = None,
        frame_mask: torch.Tensor | None = None,
        backbone_states: dict[int, torch.Tensor] | None = None,
        qformer_input_ids: torch.LongTensor | None = None,
        qformer_attention_mask: torch.LongTensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Videos to query tokens.

        Args:
            pixel_values_videos: (V, T, 3, H, W).
            frame_mask: (V, T), nonzero = a real frame.
            backbone_states: in place of the videos, see [`BTAdapterVisionModel.forward`].
            qformer_input_ids, qformer_attention_mask: (V, words), where the Q-Former reads text.
            kwargs: `output_hidden_states` and the like, for the tower, and for the Q-Former where the host's
                `get_image_features` hands them on.

        Returns:
            As the host's `get_image_features`; `pooler_output` is (V, query tokens, width of the language model).

        Raises:
            ValueError: if the videos are not 5-D.
        """
        if backbone_states is None and pixel_values_videos.ndim != 5:
            raise ValueError(
                f"pixel_values_videos has shape {tuple(pixel_values_videos.shape)}; expected (V, T, 3, H, W). Images "
                "are passed as pixel_values."
            )
        seen = pixel_values_videos if backbone_states is None else next(iter(backbone_states.values()))
        check_frames(self.config, seen.shape[1])
        text = {"qformer_input_ids": qformer_input_ids, "qformer_attention_mask": qformer_attention_mask}
        text = {name: value for name, value in text.items() if value is not None}
        given = {"frame_mask": frame_mask, "backbone_states": backbone_states}
        vision_outputs = self.vision_model(pixel_values_videos, **given, **{**kwargs, "return_dict": True})
        qformer_outputs = self._query(vision_outputs.last_hidden_state, **text, **kwargs)
        queries = qformer_outputs.last_hidden_state[:, : self.config.num_query_tokens]
        return BaseModelOutputWithVisionQformerOutputs(
            last_hidden_state=vision_outputs.last_hidden_state,
            pooler_output=self.language_projection(queries.to(vision_outputs.last_hidden_state.dtype)),
            hidden_states=vision_outputs.hidden_states,
            attentions=vision_outputs.attentions,
            vision_outputs=vision_outputs,
            qformer_outputs=qformer_outputs,
        )

    def _encode(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.FloatTensor | None,
        pixel_values_videos: torch.FloatTensor | None,
        frame_mask: torch.Tensor | None,
        interpolate_pos_encoding: bool,
        text: dict[str, torch.Tensor],
        backbone_states: dict[int, torch.Tensor] | None = None,
    ) -> dict[str, BaseModelOutputWithPooling]:
        """Features under "image" and "video". `text` is per row of the prompt; each visual gets that of its row."""
        if input_ids is None:
            raise ValueError(
                "Images and videos find their places by the placeholders in input_ids: pass what the processor of "
                "this model returns."
            )
        options = {
            "image": {"interpolate_pos_encoding": interpolate_pos_encoding},
            "video": {"frame_mask": frame_mask, "backbone_states": backbone_states},
        }
        states = None if backbone_states is None else next(iter(backbone_states.values()))
        for key, value in text.items():
            if len(value) != len(input_ids):
                raise ValueError(f"{key} has {len(value)} rows, and input_ids has {len(input_ids)}.")
        encoded = {}
        for kind, pixels in (("image", pixel_values), ("video", pixel_values_videos)):
            token_id, Q = getattr(self.config, f"{kind}_token_id"), self.config.num_query_tokens
            seen = states if kind == "video" and pixels is None else pixels
            count = 0 if seen is None else len(seen)
            check_placeholders(input_ids, token_id, count, count * Q, kind)
            if seen is None:
                continue
            visuals_of_row = (input_ids == token_id).sum(dim=1) // Q
            own = {key: value.repeat_interleave(visuals_of_row, dim=0) for key, value in text.items()}
            features = self.get_image_features if kind == "image" else self.get_video_features
            encoded[kind] = features(pixels, **own, **options[kind], return_dict=True)
        return encoded

    def _embed(self, input_ids: torch.LongTensor, encoded: dict[str, BaseModelOutputWithPooling]) -> torch.FloatTensor:
        """Prompt (B, S) -> embeddings (B, S, D) with the visual tokens in their places."""
        check_length(self.config, input_ids.shape[1])
        placeholders = {"image": self.config.image_token_id, "video": self.config.video_token_id}
        inputs_embeds = embed_text(self.get_input_embeddings(), input_ids, self.config.text_config.vocab_size)
        for kind, token_id in placeholders.items():
            output = encoded.get(kind)
            features = [] if output is None else output.pooler_output
            inputs_embeds = put_in_place(inputs_embeds, input_ids, token_id, features, kind)
        return inputs_embeds

    def _answer(
        self,
        input_ids: torch.LongTensor,
        encoded: dict[str, BaseModelOutputWithPooling],
        attention_mask: torch.Tensor | None,
        labels: torch.LongTensor | None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Runs the language model: loss, logits and its own output."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        inputs = {"inputs_embeds": self._embed(input_ids, encoded), "attention_mask": attention_mask, **kwargs}
        if not self.config.use_decoder_only_language_model:
            outputs = self.language_model(**inputs, labels=labels, return_dict=True)
            return {"loss": outputs.loss, "logits": outputs.logits, "language_model_outputs": outputs}
        outputs = self.language_model(**inputs)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=outputs.logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return {"loss": loss, "logits": outputs.logits, "language_model_outputs": outputs}

    def _generate(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor | None,
        encoded: dict[str, BaseModelOutputWithPooling],
        **generate_kwargs: Any,
    ) -> torch.LongTensor:
        """As in the native hosts: the language model generates from the embeddings of the prompt."""
        if hasattr(self, "hf_device_map"):
            self._preprocess_accelerate()
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        inputs = {"inputs_embeds": self._embed(input_ids, encoded), "attention_mask": attention_mask}
        if not self.language_model.config.is_encoder_decoder:
            # The ids are for penalties and the result only, and must lie in the vocabulary.
            inputs["input_ids"] = self._known_ids(input_ids)
        return self.language_model.generate(**inputs, **generate_kwargs)

    def _known_ids(self, input_ids: torch.LongTensor) -> torch.LongTensor:
        return input_ids.masked_fill(input_ids >= self.config.text_config.vocab_size, 0)

    def _prompt(
        self, pixel_values: torch.FloatTensor | None, pixel_values_videos: torch.FloatTensor | None
    ) -> torch.LongTensor:
        """The prompt of the native hosts when none is given: query tokens, and the start token."""
        visuals = [x for x in (pixel_values, pixel_values_videos) if x is not None]
        if len(visuals) != 1:
            raise ValueError("Without input_ids pass either images or videos: one per answer.")
        token_id = self.config.image_token_id if pixel_values is not None else self.config.video_token_id
        ids = [token_id] * self.config.num_query_tokens + [self.config.text_config.bos_token_id]
        return torch.tensor([ids] * len(visuals[0]), device=visuals[0].device)
