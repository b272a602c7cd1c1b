"""MiniGPT-4 with a BT-Adapter: the image tower and Q-Former of BLIP-2, one linear layer, and Vicuna."""

import copy
import os
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2PreTrainedModel,
    Blip2QFormerModel,
    Blip2VisionModel,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.models.blip_2.modeling_blip_2 import Blip2ForConditionalGenerationModelOutput

from .chat_templates_bt_adapter import MINIGPT4_STOP
from .compat_bt_adapter import BaseModelOutputWithPooling, can_return_tuple
from .configuration_bt_adapter import TOWER_FIELDS
from .configuration_bt_adapter_chat import BTAdapterMiniGPT4Config
from .modeling_bt_adapter_chat import NEEDS_PACKAGE
from .modeling_bt_adapter_qformer import BTAdapterQFormerChatMixin
from .modeling_bt_adapter_vision import BTAdapterVisionModel, package_loading


class BTAdapterMiniGPT4ForConditionalGeneration(BTAdapterQFormerChatMixin, Blip2ForConditionalGeneration):
    """MiniGPT-4 that takes videos: `num_query_tokens` tokens per image or video, anywhere in the prompt.

    Images take the native path, with logits equal bit for bit to those of a `Blip2ForConditionalGeneration` with the
    same parts. `vision_model` is a [`BTAdapterVisionModel`].

    Answers end where `generation_config.stop_sequences`, a list of lists of ids, says: at "###".
    """

    config: BTAdapterMiniGPT4Config

    def __init__(self, config: BTAdapterMiniGPT4Config):
        Blip2PreTrainedModel.__init__(self, config)
        config.validate()
        self.vision_model = BTAdapterVisionModel._from_config(config.vision_config)
        if config.post_layernorm_eps is not None:
            self.vision_model.vision_model.post_layernorm.eps = config.post_layernorm_eps
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, config.qformer_config.hidden_size))
        self.qformer = Blip2QFormerModel._from_config(config.qformer_config)
        self.language_projection = nn.Linear(config.qformer_config.hidden_size, config.text_config.hidden_size)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()
        self.freeze_backbone()

    @classmethod
    def from_components(
        cls,
        *,
        vision_qformer: str | os.PathLike,
        language_model: str | os.PathLike,
        projection: str | os.PathLike,
        bt_adapter: str | os.PathLike | None = None,
        allow_backbone_mismatch: bool = False,
        image_token_index: int | None = None,
        dtype: torch.dtype | str = "auto",
        **hub: Any,
    ) -> "BTAdapterMiniGPT4ForConditionalGeneration":
        """Puts MiniGPT-4 together from public pieces. Save the result: it is one ordinary checkpoint then.

        Args:
            vision_qformer: BLIP-2 checkpoint whose image tower, Q-Former and queries are used
                (Salesforce/blip2-flan-t5-xxl).
            language_model: Llama checkpoint with its tokenizer (Vicuna v0).
            projection: the authors' `.pth`, with `llama_proj.weight` and `llama_proj.bias`. Only tensors are read.
            bt_adapter: adapter folder, or id on the Hub; without it the branch is fresh and warm-started.
            allow_backbone_mismatch: see [`from_pretrained`].
            image_token_index: id of the image placeholder; by default that of `<image>` in the tokenizer, which is
                added to it as [`BTAdapterMiniGPT4Processor`] does. The next is that of the video placeholder.
            dtype: of the language model, and of the rest.
            hub: `cache_dir`, `token`, `local_files_only` for all checkpoints.

        Raises:
            ValueError: if a piece lacks weights, or the pieces do not fit one another.
            AdapterError: if the adapter is damaged, or was trained on another backbone.
        """
        speech = AutoModelForCausalLM.from_pretrained(language_model, dtype=dtype, **hub)
        eyes = _Blip2Eyes.from_pretrained(vision_qformer, dtype=speech.dtype, **hub)
        tokenizer = AutoTokenizer.from_pretrained(language_model, **hub)
        weight, bias = _projection(projection, eyes.config.qformer_config.hidden_size, speech.config.hidden_size)
        tokenizer.add_tokens(["<image>", "<video>"], special_tokens=True)  # none that is there already
        image_token, video_token = tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
        if image_token_index is not None:
            image_token, video_token = image_token_index, image_token_index + 1
        config = BTAdapterMiniGPT4Config(
            vision_config=eyes.config.vision_config,
            qformer_config=eyes.config.qformer_config,
            text_config=speech.config,
            num_query_tokens=eyes.config.num_query_tokens,
            image_token_index=image_token,
            video_token_index=video_token,
        )
        package = package_loading()
        if package is None and bt_adapter is not None:
            raise ImportError(NEEDS_PACKAGE)
        adapter = None if bt_adapter is None else package.fit_config(config, bt_adapter, hub)
        with torch.device("meta"):
            model = cls(config)
        fields = {name: getattr(config.vision_config, name) for name in TOWER_FIELDS}
        tower = BTAdapterVisionModel.from_backbone(eyes.vision_model, **fields)
        tower.vision_model.post_layernorm.eps = config.post_layernorm_eps
        model.config.vision_config, model.config.dtype = tower.config, speech.dtype
        model.vision_model, model.query_tokens, model.qformer = tower, eyes.query_tokens, eyes.qformer
        model.language_projection = nn.Linear(weight.shape[1], weight.shape[0], dtype=speech.dtype)
        model.language_projection.load_state_dict({"weight": weight, "bias": bias})
        model.language_model = speech
        if adapter is not None:
            package.fill_branch(model, *adapter, allow_backbone_mismatch)
        model.freeze_backbone()
        model.generation_config = copy.deepcopy(speech.generation_config)
        model.generation_config.stop_sequences = stop_sequences(tokenizer)
        model.generation_config._from_model_config = False  # else unknown fields are dropped at loading
        return model.eval()

    def _query(self, image_embeds: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        # as in BLIP-2, whose Q-Former is not asked for hidden states
        return self.qformer(
            query_embeds=self.query_tokens.expand(len(image_embeds), -1, -1),
            encoder_hidden_states=image_embeds,
            encoder_attention_mask=torch.ones(image_embeds.shape[:2], dtype=torch.long, device=image_embeds.device),
            return_dict=True,
        )

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        frame_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        interpolate_pos_encoding: bool = False,
        backbone_states: dict[int, torch.Tensor] | None = None,
        **kwargs,
    ) -> Blip2ForConditionalGenerationModelOutput:
        """
        Args:
            pixel_values: (images, 3, H, W), in the order of the batch.
            input_ids: (B, S), with `num_query_tokens` placeholders where an image or a video belongs.
            attention_mask: (B, S).
            pixel_values_videos: (videos, T, 3, H, W), in the order of the batch.
            frame_mask: (videos, T), nonzero = a real frame, where the videos differ in length.
            labels: (B, S), -100 where no loss is wanted.
            interpolate_pos_encoding: of images of another size.
            backbone_states: in place of pixel_values_videos, see [`BTAdapterVisionModel.forward`].
            kwargs: for the language model.

        Raises:
            ValueError: if placeholders and visual tokens differ in number, or the prompt is too long for the model.
        """
        visuals = (pixel_values, pixel_values_videos, frame_mask, interpolate_pos_encoding)
        encoded = self._encode(input_ids, *visuals, {}, backbone_states)
        first = next(iter(encoded.values()), None)
        return Blip2ForConditionalGenerationModelOutput(
            **self._answer(input_ids, encoded, attention_mask, labels, **kwargs),
            vision_outputs=None if first is None else first.vision_outputs,
            qformer_outputs=None if first is None else first.qformer_outputs,
        )

    @torch.no_grad()
    def generate(
        self,
        pixel_values: torch.FloatTensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        frame_mask: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        stopping_criteria: StoppingCriteriaList | None = None,
        **generate_kwargs,
    ) -> torch.LongTensor:
        """Answers, as ids; see [`forward`] for the inputs and transformers' `generate` for `generate_kwargs`."""
        if input_ids is None:
            input_ids = self._prompt(pixel_values, pixel_values_videos)
        encoded = self._encode(input_ids, pixel_values, pixel_values_videos, frame_mask, interpolate_pos_encoding, {})
        config = generate_kwargs.get("generation_config") or self.generation_config
        criteria = StoppingCriteriaList(stopping_criteria or [])
        if sequences := getattr(config, "stop_sequences", None):
            criteria.append(StopAtSequences(sequences, input_ids.shape[1]))
        return self._generate(input_ids, attention_mask, encoded, stopping_criteria=criteria, **generate_kwargs)


class StopAtSequences(StoppingCriteria):
    """Ends each row by itself when the ids after the prompt end with one of the sequences."""

    def __init__(self, sequences: list[list[int]], prompt_length: int):
        self.sequences, self.prompt_length = sequences, prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        answer = input_ids[:, self.prompt_length :]
        done = torch.zeros(len(answer), dtype=torch.bool, device=answer.device)
        for sequence in self.sequences:
            if answer.shape[1] >= len(sequence):
                done |= (answer[:, -len(sequence) :] == answer.new_tensor(sequence)).all(dim=1)
        return done


def stop_sequences(tokenizer: Any) -> list[list[int]]:
    """The ids of "###" at the start of a word and within one: Llama's tokenizer spells them differently."""
    alone = tokenizer.encode(MINIGPT4_STOP, add_special_tokens=False)
    line, both = (tokenizer.encode(text, add_special_tokens=False) for text in ("\n", f"\n{MINIGPT4_STOP}"))
    found = [alone]
    if both[: len(line)] == line and both[len(line) :] not in ([], alone):
        found.append(both[len(line) :])
    return found


class _Blip2Eyes(Blip2PreTrainedModel):
    """The parts of a BLIP-2 checkpoint in front of its language model."""

    config: Blip2Config
    _keep_in_fp32_modules = ["query_tokens", "qformer"]
    _keys_to_ignore_on_load_unexpected = [r"^language_model\.", r"^language_projection\.", r"position_ids$"]
    _new_modules = ()

    def __init__(self, config: Blip2Config):
        super().__init__(config)
        self.vision_model = Blip2VisionModel._from_config(config.vision_config)
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, config.qformer_config.hidden_size))
        self.qformer = Blip2QFormerModel._from_config(config.qformer_config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, **kwargs: Any) -> PreTrainedModel:
        package = package_loading()
        if package is None:
            return super().from_pretrained(source, **kwargs)
        model, info = super().from_pretrained(source, **{**kwargs, **package.REPORT})
        package.check_loading(model, info, source)
        return model


def _projection(path: str | os.PathLike, width: int, out_width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`llama_proj` of the authors' file."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    state = content.get("model", content)
    try:
        weight, bias = state["llama_proj.weight"], state["llama_proj.bias"]
    except KeyError as error:
        raise ValueError(
            f"{path} has no {error}: it is not one of MiniGPT-4's files. It holds {len(state)} entries, among them "
            f"{', '.join(list(state)[:3])}."
        ) from error
    if tuple(weight.shape) != (out_width, width) or tuple(bias.shape) != (out_width,):
        raise ValueError(
            f"llama_proj in {path} is {tuple(weight.shape)}; a Q-Former of width {width} and a language model of "
            f"width {out_width} need {(out_width, width)}. MiniGPT-4 has one file for each size of Vicuna."
        )
    return weight, bias


for _auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
    _auto.register(BTAdapterMiniGPT4Config, BTAdapterMiniGPT4ForConditionalGeneration, exist_ok=True)
