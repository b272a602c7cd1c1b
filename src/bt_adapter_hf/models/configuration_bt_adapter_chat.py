"""Configurations of the chat models: a native host whose vision config is that of a BT-Adapter tower."""

from typing import Any, ClassVar

from transformers import AutoConfig, Blip2Config, InstructBlipConfig, LlavaConfig, PreTrainedConfig

from .compat_bt_adapter import SubConfigSpec, strict
from .configuration_bt_adapter import BTAdapterVisionConfig, with_fields


class BTAdapterHostConfigMixin:
    """What the host configs share: a native config becomes one of ours, with a branch that fits the host.

    A host reads the fused tokens of one backbone layer or several. Branch layers fed later than that, and the gate of
    the pooled feature, could not learn; a host's tower is without them.
    """

    native_model_type: ClassVar[str]
    backbone_model_type: ClassVar[str]

    def __post_init__(self, **kwargs):
        self.vision_config = self._tower_config(self.vision_config)
        super().__post_init__(**kwargs)
        if self.video_token_index is None and self.image_token_index is not None:
            # The next free id, as a tokenizer gives it to a token that is added last.
            self.video_token_index = max(self.image_token_index, self._pad_token_id() or 0) + 1

    def _tower_config(self, vision_config: Any) -> Any:
        """A native vision config (object, dict or nothing) -> dict of a tower config with the host's defaults."""
        if isinstance(vision_config, BTAdapterVisionConfig):
            return vision_config
        if isinstance(vision_config, PreTrainedConfig):
            vision_config = {"backbone": vision_config}
        vision_config = dict(vision_config or {})
        if "backbone" not in vision_config:
            vision_config = {"backbone": vision_config}
        tower = {**vision_config, "model_type": BTAdapterVisionConfig.model_type}
        backbone = tower["backbone"]
        if isinstance(backbone, dict):
            backbone = dict(backbone)
            # The dict of a bare tower config may come without a type of its own.
            model_type = backbone.pop("model_type", None) or self.backbone_model_type
            backbone = AutoConfig.for_model(model_type, **backbone)
        depth = backbone.num_hidden_layers
        if tower.get("adapter_layers") is None:
            tower["adapter_layers"] = self.default_layers(depth)
        return {**self.fit_branch(tower), "backbone": backbone}

    def fit_branch(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Fields of a tower config -> the same without what this host would leave unused."""
        if fields.get("token_fusion", "mean") == "mean":
            fields = {**fields, "output_fusion": "sum"}
        return fields

    def last_state(self, depth: int) -> int:
        """The highest index into a tower's `depth + 1` hidden states that reaches the language model."""
        return depth

    def default_layers(self, depth: int) -> list[int]:
        """Layers for a fresh branch: three, as the EVA towers of these hosts lack the last of EVA-CLIP's 40 layers."""
        return list(range(max(0, depth - 3), depth))

    def _pad_token_id(self) -> int | None:
        ids = (getattr(self, "pad_token_id", None), getattr(self.text_config, "pad_token_id", None))
        return next((i for i in ids if i is not None), None)

    def validate_architecture(self):
        """Part of `@strict`-powered validation: the branch must be one that the host can use, and train, whole."""
        tower, top = self.vision_config, self.last_state(self.vision_config.num_hidden_layers)
        if tower.adapter_layers[-1] >= top:
            raise ValueError(
                f"adapter_layers={tower.adapter_layers} goes beyond layer {top - 1}, the last backbone layer whose "
                f"output reaches the language model; use {[n for n in tower.adapter_layers if n < top]}."
            )
        if tower.output_fusion == "gate" and tower.token_fusion != "gate":
            raise ValueError(
                'output_fusion="gate" makes a gate that only the pooled feature uses, and a chat model uses the '
                'tokens: set output_fusion="sum", or token_fusion="gate".'
            )

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        # A native checkpoint of the host becomes one of ours, with a fresh branch.
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config.get("model_type") == cls.native_model_type:
            config = {**config, "model_type": cls.model_type, **cls._native_fields()}
        return config, kwargs

    @classmethod
    def _native_fields(cls) -> dict[str, Any]:
        """Fields of ours that say what the native host does."""
        return {}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As in transformers; keyword arguments that are fields of the tower's config are passed on to it."""
        return super().from_dict(with_fields(cls, config_dict, kwargs), **kwargs)


@strict
class BTAdapterLlavaConfig(BTAdapterHostConfigMixin, LlavaConfig):
    r"""
    Configuration of [`BTAdapterLlavaForConditionalGeneration`].

    LLaVA reads the tokens of `vision_feature_layer`, -2 as released. A branch for the last four layers of CLIP takes
    part with its first three then, those fed by what comes before.

    Args:
        vision_config (`BTAdapterVisionConfig`, `PreTrainedConfig` or `dict`, *optional*):
            Config of the tower; that of a native vision model is wrapped into one.
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            Config of the language model.
        video_token_index (`int`, *optional*):
            Id of the video placeholder, which is that of [`BTAdapterLlavaProcessor`]: by default the next after those
            of the image placeholder and of padding; a model made of a native checkpoint takes the next that its
            tokenizer gives. The language model's embedding of it is not used: it may lie beyond the vocabulary.
        kwargs:
            The other fields of `LlavaConfig`.

    Raises:
        ValueError: if the branch has parts that cannot reach the language model.
    """

    model_type = "bt_adapter_llava"
    native_model_type: ClassVar[str] = "llava"
    backbone_model_type: ClassVar[str] = "clip_vision_model"
    attribute_map: ClassVar[dict] = {"image_token_id": "image_token_index", "video_token_id": "video_token_index"}
    sub_configs_defaults: ClassVar[dict] = {
        "vision_config": BTAdapterVisionConfig,
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    video_token_index: int | None = None

    def fit_branch(self, fields: dict[str, Any]) -> dict[str, Any]:
        fields = super().fit_branch(fields)
        if self.vision_feature_select_strategy == "default":  # the CLS is dropped, from the front
            fields = {**fields, "cls_position": "first"}
        return fields

    def last_state(self, depth: int) -> int:
        layers = self.vision_feature_layer
        return max(layer % (depth + 1) for layer in ([layers] if isinstance(layers, int) else layers))

    def default_layers(self, depth: int) -> list[int]:
        top = self.last_state(depth)
        last_four = [layer for layer in range(max(0, depth - 4), depth) if layer < top]
        return last_four or list(range(max(0, top - 4), top))

    def validate_architecture(self):
        super().validate_architecture()
        if self.vision_feature_select_strategy == "default" and self.vision_config.cls_position == "last":
            raise ValueError(
                'vision_feature_select_strategy="default" drops the first token as the CLS: set cls_position="first", '
                'or keep all tokens with vision_feature_select_strategy="full".'
            )


@strict
class BTAdapterInstructBlipConfig(BTAdapterHostConfigMixin, InstructBlipConfig):
    r"""
    Configuration of [`BTAdapterInstructBlipForConditionalGeneration`].

    Args:
        vision_config (`BTAdapterVisionConfig`, `PreTrainedConfig` or `dict`, *optional*):
            Config of the tower; that of a native vision model is wrapped into one.
        video_token_index (`int`, *optional*):
            Id of the video placeholder, see [`BTAdapterLlavaConfig`].
        kwargs:
            The other fields of `InstructBlipConfig`.
    """

    model_type = "bt_adapter_instructblip"
    native_model_type: ClassVar[str] = "instructblip"
    backbone_model_type: ClassVar[str] = "instructblip_vision_model"
    attribute_map: ClassVar[dict] = {"image_token_id": "image_token_index", "video_token_id": "video_token_index"}
    sub_configs_defaults: ClassVar[dict] = {
        **InstructBlipConfig.sub_configs_defaults,
        "vision_config": BTAdapterVisionConfig,
    }

    video_token_index: int | None = None


@strict
class BTAdapterMiniGPT4Config(BTAdapterHostConfigMixin, Blip2Config):
    r"""
    Configuration of [`BTAdapterMiniGPT4ForConditionalGeneration`]: a BLIP-2 with a Llama behind it.

    Args:
        vision_config (`BTAdapterVisionConfig`, `PreTrainedConfig` or `dict`, *optional*):
            Config of the tower; that of a native vision model is wrapped into one.
        video_token_index (`int`, *optional*):
            Id of the video placeholder, see [`BTAdapterLlavaConfig`].
        post_layernorm_eps (`float`, *optional*, defaults to 1e-5):
            Epsilon of the layer norm behind the image tower (`ln_vision`). As released it is 1e-5, while the layer
            norms inside have 1e-6; transformers' BLIP-2 uses the latter for all. None: that of the tower, which is
            what a native BLIP-2 checkpoint gets.
        kwargs:
            The other fields of `Blip2Config`.
    """

    model_type = "bt_adapter_minigpt4"
    native_model_type: ClassVar[str] = "blip-2"
    backbone_model_type: ClassVar[str] = "blip_2_vision_model"
    attribute_map: ClassVar[dict] = {"image_token_id": "image_token_index", "video_token_id": "video_token_index"}
    sub_configs_defaults: ClassVar[dict] = {
        **Blip2Config.sub_configs_defaults,
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
        "vision_config": BTAdapterVisionConfig,
    }

    video_token_index: int | None = None
    post_layernorm_eps: float | None = 1e-5

    @classmethod
    def _native_fields(cls) -> dict[str, Any]:
        return {"post_layernorm_eps": None}


for _config in (BTAdapterLlavaConfig, BTAdapterInstructBlipConfig, BTAdapterMiniGPT4Config):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
