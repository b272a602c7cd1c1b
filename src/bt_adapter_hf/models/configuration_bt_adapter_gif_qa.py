"""Configurations of GIF question answering: the frame-wise X-CLIP tower, and the model of tower, connector and LLM."""

from typing import Any, ClassVar

from transformers import AutoConfig, Blip2QFormerConfig, PreTrainedConfig, XCLIPVisionConfig

from .compat_bt_adapter import SubConfigSpec, strict
from .configuration_bt_adapter import BTAdapterVisionConfig


CONNECTORS = ("mlp", "attention", "qformer")


@strict
class XCLIPFramesConfig(PreTrainedConfig):
    r"""
    Configuration of [`XCLIPFramesModel`]. `from_pretrained` takes an X-CLIP checkpoint too.

    Args:
        backbone (`XCLIPVisionConfig` or `dict`, *optional*):
            Config of X-CLIP's vision model; its `num_frames` is the number of frames that the tower takes.
    """

    model_type = "xclip_frames"
    base_config_key = "vision_config"
    sub_configs_defaults: ClassVar[dict] = {"backbone": XCLIPVisionConfig}

    backbone: dict | PreTrainedConfig | None = None

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config.get("model_type") == "xclip":
            config = {"model_type": cls.model_type, "backbone": config.get("vision_config") or {}}
        return config, kwargs

    @property
    def hidden_size(self) -> int:
        """Width of the states, one per frame."""
        return self.backbone.mit_hidden_size

    @property
    def num_frames(self) -> int:
        return self.backbone.num_frames

    @property
    def image_size(self) -> int:
        return self.backbone.image_size

    @property
    def patch_size(self) -> int:
        return self.backbone.patch_size

    @property
    def initializer_range(self) -> float:
        return self.backbone.initializer_range

    @property
    def initializer_factor(self) -> float:
        return self.backbone.initializer_factor


@strict
class BTAdapterGifQAConfig(PreTrainedConfig):
    r"""
    Configuration of [`BTAdapterGifQAForConditionalGeneration`].

    Args:
        vision_config (`XCLIPFramesConfig`, `BTAdapterVisionConfig` or `dict`, *optional*):
            Config of the tower, which tells of which kind it is.
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            Config of the language model: of any that `AutoModelForCausalLM` makes.
        connector (`str`, *optional*, defaults to `"mlp"`):
            `"mlp"`: two layers on each state of the tower. `"attention"`: learned queries attend to the states.
            `"qformer"`: BLIP-2's Q-Former with learned queries reads them.
        num_query_tokens (`int`, *optional*, defaults to 16):
            Queries, and so tokens per group of frames, of the latter two.
        qformer_config (`Blip2QFormerConfig` or `dict`, *optional*):
            Of the Q-Former; by default a small one: 4 layers of the width of the tower.
        group_frames (`bool`, *optional*, defaults to `True`):
            Give X-CLIP more frames than it takes in groups, of which the last is padded and masked. False: another
            number of frames than X-CLIP's is an error.
        video_token_index (`int`, *optional*):
            Id of the GIF's placeholder in prompts; that of [`BTAdapterGifQAProcessor`].
    """

    model_type = "bt_adapter_gif_qa"
    attribute_map: ClassVar[dict] = {"video_token_id": "video_token_index"}
    sub_configs_defaults: ClassVar[dict] = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="xclip_frames"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }
    # A Q-Former whose host is an image chat model: what these ask for.
    image_token_id: ClassVar[None] = None
    use_decoder_only_language_model: ClassVar[bool] = True

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    connector: str = "mlp"
    num_query_tokens: int = 16
    qformer_config: dict | PreTrainedConfig | None = None
    group_frames: bool = True
    video_token_index: int | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if isinstance(self.qformer_config, dict):
            self.qformer_config = Blip2QFormerConfig(**self.qformer_config)
        super().__post_init__(**kwargs)
        width = self.vision_config.hidden_size
        if self.qformer_config is None and self.connector == "qformer":
            self.qformer_config = Blip2QFormerConfig(
                hidden_size=width,
                encoder_hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=4,
                num_attention_heads=max(1, width // 64),
                cross_attention_frequency=1,
            )

    def validate_architecture(self):
        """Part of `@strict`-powered validation: tower and connector must fit each other."""
        tower = self.vision_config
        if not isinstance(tower, (XCLIPFramesConfig, BTAdapterVisionConfig)):
            raise ValueError(
                f"The tower of GIF question answering is an X-CLIP (xclip_frames) or a BT-Adapter "
                f"(bt_adapter_vision), not a {tower.model_type}."
            )
        if self.connector not in CONNECTORS:
            raise ValueError(f"connector={self.connector!r} must be one of {', '.join(map(repr, CONNECTORS))}.")
        if self.num_query_tokens < 1:
            raise ValueError(f"num_query_tokens={self.num_query_tokens} must be at least 1.")
        if self.connector == "qformer" and self.qformer_config.encoder_hidden_size != tower.hidden_size:
            raise ValueError(
                f"The Q-Former reads states of width {self.qformer_config.encoder_hidden_size}, and those of the "
                f"tower are {tower.hidden_size} wide: set qformer_config.encoder_hidden_size={tower.hidden_size}."
            )

    def fit_branch(self, fields: dict[str, Any]) -> dict[str, Any]:
        """As of the other hosts of a BT-Adapter, which read the tokens and not the pooled feature."""
        return {**fields, "output_fusion": "sum"} if fields.get("token_fusion", "mean") == "mean" else fields

    def last_state(self, depth: int) -> int:
        return depth

    @property
    def frames_per_group(self) -> int | None:
        """Frames that X-CLIP takes at a time; None: the tower takes any number."""
        return self.vision_config.num_frames if isinstance(self.vision_config, XCLIPFramesConfig) else None

    @property
    def tokens_per_group(self) -> int | None:
        """Tokens of a group of frames, or of a GIF whose tower takes all its frames; None: one per frame."""
        if self.connector != "mlp":
            return self.num_query_tokens
        if isinstance(self.vision_config, XCLIPFramesConfig):
            return None
        tower = self.vision_config
        return (tower.image_size // tower.patch_size) ** 2 + (tower.backbone.model_type != "siglip_vision_model")


AutoConfig.register(XCLIPFramesConfig.model_type, XCLIPFramesConfig, exist_ok=True)
AutoConfig.register(BTAdapterGifQAConfig.model_type, BTAdapterGifQAConfig, exist_ok=True)
