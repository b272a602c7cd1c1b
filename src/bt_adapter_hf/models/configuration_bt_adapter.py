"""Configurations of the BT-Adapter tower and of the dual encoder."""

from typing import Any, ClassVar, Literal

from transformers import AutoConfig, CLIPTextConfig, PreTrainedConfig

from .compat_bt_adapter import SubConfigSpec, strict


# The `model_type` of the vision part, for native checkpoints whose nested vision config does not name its own.
_VISION_TYPE_OF = {
    "clip": "clip_vision_model",
    "siglip": "siglip_vision_model",
    "instructblip": "instructblip_vision_model",
    "blip-2": "blip_2_vision_model",
}
BACKBONE_TYPES = tuple(_VISION_TYPE_OF.values())


def _as_tower_config(vision_config: Any, outer_type: str | None = None) -> Any:
    """Wraps a native vision config (object or dict) into the dict of a tower config; leaves a tower config alone."""
    if isinstance(vision_config, PreTrainedConfig) and vision_config.model_type in BACKBONE_TYPES:
        return {"backbone": vision_config}
    if isinstance(vision_config, dict) and "backbone" not in vision_config:
        model_type = vision_config.get("model_type", _VISION_TYPE_OF.get(outer_type))
        if model_type in BACKBONE_TYPES:
            return {"backbone": {**vision_config, "model_type": model_type}}
    return vision_config


def _of_backbone(name: str, *default: Any) -> property:
    """A size of the tower, which is its backbone's."""
    return property(
        lambda self: getattr(self.backbone, name, *default), lambda self, value: setattr(self.backbone, name, value)
    )


@strict
class BTAdapterVisionConfig(PreTrainedConfig):
    r"""
    Configuration of [`BTAdapterVisionModel`]: a frozen image backbone with the BT-Adapter branch beside it.

    The defaults are what the released CLIP weights need. Where the paper and the released code differ, both readings
    can be chosen by a field; "as released" below means what the authors' released code computes.

    Args:
        backbone (`PreTrainedConfig` or `dict`, *optional*):
            Config of the image backbone. Its `model_type` is one of `clip_vision_model`, `siglip_vision_model`,
            `instructblip_vision_model`, `blip_2_vision_model`.
        adapter_layers (`list[int]`, *optional*, defaults to the last four layers):
            Backbone layers whose *outputs* feed the branch, one per branch layer, counted from 0, ascending. The last
            K layers are as released; `[L-K-1, ..., L-2]` is the pairing of paper Eq. 3 and 4.
        max_frames (`int`, *optional*, defaults to 64):
            Rows of the time embedding table.
        num_trained_frames (`int`, *optional*, defaults to 0):
            How many rows of that table were trained, from the first: the frames per video of the training, which
            records them here. A video of another number of frames is embedded by linear interpolation between these
            rows, its first frame on the first and its last frame on the last. 0: not recorded yet; the rows are read
            as released, the first T of the table and beyond it an interpolation of all. None: as released for good,
            which is what converted weights get, and what training leaves alone.
        time_embedding_init_std (`float`, *optional*, defaults to 1.0):
            Standard deviation of fresh time embeddings (1.0 as released).
        fusion (`"gate"` or `"sum"`, *optional*, defaults to `"gate"`):
            How branch layers after the first take in the backbone: a learned weight per channel (paper Eq. 4), or a
            plain sum (released EVA weights, and the released zero-shot configs).
        fusion_gate_scale (`float`, *optional*, defaults to 100.0):
            Factor on the gate parameter inside the sigmoid of `fusion` (100 as released, 1 in the paper).
        output_fusion (`"gate"` or `"sum"`, *optional*, defaults to `"gate"`):
            How the final outputs of backbone and branch are combined for the pooled feature (paper Eq. 5).
        output_gate_scale (`float`, *optional*, defaults to 10000.0):
            Factor on the gate parameter inside the sigmoid of `output_fusion` (10000 as released, 1 in the paper).
        gate_on (`"backbone"` or `"branch"`, *optional*, defaults to `"backbone"`):
            Which side the sigmoid multiplies: the backbone as released, the branch in paper Eq. 4 and 5.
        video_cls (`"average"` or `"token"`, *optional*, defaults to `"average"`):
            `"average"` as released: the branch starts from the mean of the new token and the mean frame CLS, and later
            layers take in the mean frame CLS. `"token"`: the new token alone, never mixed (paper Eq. 3 and 4).
            Backbones without a CLS token have no video CLS.
        pooling_order (`"norm_then_mean"` or `"mean_then_norm"`, *optional*, defaults to `"norm_then_mean"`):
            Combine and normalise per frame, then average over time, as released; or the order of paper Eq. 5.
        token_fusion (`"mean"` or `"gate"`, *optional*, defaults to `"mean"`):
            How `last_hidden_state` and `hidden_states` combine backbone and branch tokens: half and half as released
            in LLaVA, or with the output gate (paper section 3.2).
        cls_position (`"first"` or `"last"`, *optional*, defaults to `"first"`):
            Place of the CLS token in the fused token sequences of videos (`"last"` as released in LLaVA).
        drop_path_rate (`float`, *optional*, defaults to 0.1):
            Stochastic depth of the last branch layer, in [0, 1); earlier layers grow linearly from 0.
        spatial_layer_norm_eps (`float`, *optional*, defaults to 1e-5):
            Epsilon of the layer norms of the spatial blocks (1e-5 as released, for CLIP and EVA).
        temporal_layer_norm_eps (`float`, *optional*):
            Epsilon of the layer norms of the temporal blocks; the backbone's own by default, as released.
        mask_order (`"tube"` or `"released"`, *optional*, defaults to `"tube"`):
            `"tube"`: a masked patch is dropped from all frames. `"released"` reproduces a defect of the released code,
            which applies the frame-major mask to its patch-major token list, so that no tube remains.
        temporal_window (`"full"` or `"released"`, *optional*, defaults to `"full"`):
            `"full"`: temporal attention spans all frames. `"released"` reproduces the released LLaVA tower: two halves
            that do not see each other up to 64 frames, adjacent frames averaged in pairs above.
        frames_per_chunk (`int`, *optional*, defaults to 64):
            Frames that pass a frozen backbone at once, and frames of the videos that pass the branch at once where
            nothing is learned (at least one video); bounds the peak memory.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Not used by the branch, which is initialised as released; kept for the hosts that read it.

    Raises:
        ValueError: if a value is outside its range or does not fit the backbone.
    """

    model_type = "bt_adapter_vision"
    base_config_key = "vision_config"
    sub_configs_defaults: ClassVar[dict] = {
        "backbone": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model")
    }

    backbone: dict | PreTrainedConfig | None = None
    adapter_layers: list[int] | None = None
    max_frames: int = 64
    num_trained_frames: int | None = 0
    time_embedding_init_std: float = 1.0
    fusion: Literal["gate", "sum"] = "gate"
    fusion_gate_scale: float | int = 100.0
    output_fusion: Literal["gate", "sum"] = "gate"
    output_gate_scale: float | int = 10000.0
    gate_on: Literal["backbone", "branch"] = "backbone"
    video_cls: Literal["average", "token"] = "average"
    pooling_order: Literal["norm_then_mean", "mean_then_norm"] = "norm_then_mean"
    token_fusion: Literal["mean", "gate"] = "mean"
    cls_position: Literal["first", "last"] = "first"
    drop_path_rate: float | int = 0.1
    spatial_layer_norm_eps: float = 1e-5
    temporal_layer_norm_eps: float | None = None
    mask_order: Literal["tube", "released"] = "tube"
    temporal_window: Literal["full", "released"] = "full"
    frames_per_chunk: int = 64
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if isinstance(self.backbone, PreTrainedConfig):
            # A config sets the attention implementation of its parts: take over what this one has.
            kwargs.setdefault("attn_implementation", self.backbone._attn_implementation)
        super().__post_init__(**kwargs)
        if self.adapter_layers is None:
            depth = self.backbone.num_hidden_layers
            self.adapter_layers = list(range(max(0, depth - 4), depth))
        if self.temporal_layer_norm_eps is None:
            self.temporal_layer_norm_eps = self.backbone.layer_norm_eps

    def validate_architecture(self):
        """Part of `@strict`-powered validation: checks the fields against each other and against the backbone."""
        if self.backbone.model_type not in BACKBONE_TYPES:
            raise ValueError(
                f"The backbone has model_type {self.backbone.model_type!r}; supported are {', '.join(BACKBONE_TYPES)}."
            )
        depth = self.backbone.num_hidden_layers
        layers = self.adapter_layers
        if not layers or layers != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= depth:
            raise ValueError(
                f"adapter_layers={layers} must name at least one backbone layer, in ascending order without repeats, "
                f"each between 0 and {depth - 1} (this backbone has {depth} layers)."
            )
        for name in ("max_frames", "frames_per_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if not 0 <= (self.num_trained_frames or 0) <= self.max_frames:
            raise ValueError(
                f"num_trained_frames={self.num_trained_frames} must be between 0 and max_frames={self.max_frames}, or "
                "None."
            )
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate={self.drop_path_rate} must be in [0, 1).")
        if self.token_fusion == "gate" and self.output_fusion != "gate":
            raise ValueError('token_fusion="gate" uses the output gate: set output_fusion="gate" too.')

    @property
    def num_adapter_layers(self) -> int:
        return len(self.adapter_layers)

    # Hosts and processors read the sizes of the tower here, and they can be set.
    hidden_size = _of_backbone("hidden_size")
    intermediate_size = _of_backbone("intermediate_size")
    num_hidden_layers = _of_backbone("num_hidden_layers")
    num_attention_heads = _of_backbone("num_attention_heads")
    num_channels = _of_backbone("num_channels", 3)  # the EVA towers have no such field: they take RGB images only
    image_size = _of_backbone("image_size")
    patch_size = _of_backbone("patch_size")
    layer_norm_eps = _of_backbone("layer_norm_eps")

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        # Native checkpoints (CLIPModel, LLaVA, a bare vision model, ...) become a tower with a fresh branch.
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if "vision_config" in config:
            config = {**config, "vision_config": _as_tower_config(config["vision_config"], config.get("model_type"))}
            config["vision_config"].setdefault("model_type", cls.model_type)
        elif config.get("model_type") in BACKBONE_TYPES:
            config = {**_as_tower_config(config), "model_type": cls.model_type}
        return config, kwargs


_COMMON_FIELDS = PreTrainedConfig.__dataclass_fields__.keys()
TOWER_FIELDS = BTAdapterVisionConfig.__dataclass_fields__.keys() - _COMMON_FIELDS - {"backbone"}


def with_fields(cls: type[PreTrainedConfig], config_dict: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Takes the fields of a config, and of its tower, out of `kwargs` and puts them into the dict of the config.

    A dict for a sub-config changes the fields that it names and no others. One for `vision_config` may name fields of
    the tower and of its backbone.
    """
    config_dict = dict(config_dict)
    tower = {name: kwargs.pop(name) for name in TOWER_FIELDS & kwargs.keys()}
    for name in cls.__dataclass_fields__.keys() & kwargs.keys() - _COMMON_FIELDS:
        value = kwargs.pop(name)
        if name == "vision_config" and isinstance(value, dict):
            tower = {**value, **tower}
        elif name in cls.sub_configs_defaults and isinstance(value, dict):
            config_dict[name] = {**_as_dict(config_dict.get(name)), **value}
        else:
            config_dict[name] = value
    if tower:
        old = _as_dict(config_dict.get("vision_config"))
        old = old if "backbone" in old or not old else {"backbone": old}
        backbone = {**_as_dict(old.get("backbone")), **_as_dict(tower.pop("backbone", None))}
        for name in tower.keys() - TOWER_FIELDS:
            value = tower.pop(name)
            if value != BTAdapterVisionConfig.model_type:
                backbone[name] = value
        config_dict["vision_config"] = {**old, **({"backbone": backbone} if backbone else {}), **tower}
    return config_dict


def _as_dict(config: dict | PreTrainedConfig | None) -> dict[str, Any]:
    return config.to_dict() if isinstance(config, PreTrainedConfig) else dict(config or {})


@strict
class BTAdapterConfig(PreTrainedConfig):
    r"""
    Configuration of the dual encoder [`BTAdapterModel`] and of its pretraining, [`BTAdapterForPreTraining`].

    Args:
        text_config (`CLIPTextConfig` or `dict`, *optional*):
            Config of the CLIP text tower.
        vision_config (`BTAdapterVisionConfig` or `dict`, *optional*):
            Config of the video tower; the config of a native CLIP vision model is wrapped into one.
        projection_dim (`int`, *optional*, defaults to 512):
            Width of the joint text-video space.
        visual_projection_bias (`bool`, *optional*, defaults to `False`):
            Whether the projection of the video features has a bias (EVA-CLIP's has, CLIP's has not).
        logit_scale_init_value (`float`, *optional*, defaults to 2.6592):
            Initial logarithm of the factor on the cosine similarities, as in CLIP.
        mask_ratio (`float`, *optional*, defaults to 0.7):
            Share of the patches that pretraining drops from the branch, in [0, 1) (paper section 4.1).
        temperature (`float`, *optional*, defaults to 0.01):
            Fixed temperature of the contrastive pretraining losses (paper section 4.1; tau in Eq. 6).
        vtc_weight, mbta_weight, mbca_weight (`float`, *optional*, default to 1.0, 0.1, 0.1):
            Weights of video-text contrast (paper Eq. 6), masked branching token alignment (Eq. 7) and masked branching
            cross-modal alignment (Eq. 8). 1 : 0.1 : 0.1 as released, 1 : 1 : 1 in the paper.
        mbta_loss (`"cosine"` or `"mse"`, *optional*, defaults to `"cosine"`):
            Distance of the token alignment: squared distance of unit vectors, with a layer norm after the student's
            projection, as released; or the squared error of the plain projections (paper Eq. 7).
        mbta_pairing (`"matched"` or `"released"`, *optional*, defaults to `"matched"`):
            `"matched"`: a branch token is aligned with the backbone token of the same frame and patch. `"released"`
            reproduces a defect of the released code, which pairs the two lists by position although they are ordered
            differently.
        gather_gradient (`"global"` or `"released"`, *optional*, defaults to `"global"`):
            On several processes: the gradient of the loss over the global batch, or the released one, which is that
            divided by the number of processes for the contrastive terms.
        order_negatives (`"none"`, `"reversed"` or `"reversed_and_shuffled"`, *optional*, defaults to `"none"`):
            Beyond the paper: copies in other orders to contrast with. A reversed clip shows the opposite caption.

    Raises:
        ValueError: if a value is outside its range.
    """

    model_type = "bt_adapter"
    sub_configs_defaults: ClassVar[dict] = {
        "text_config": CLIPTextConfig,
        "vision_config": BTAdapterVisionConfig,
    }

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    projection_dim: int = 512
    visual_projection_bias: bool = False
    logit_scale_init_value: float | int = 2.6592
    mask_ratio: float | int = 0.7
    temperature: float = 0.01
    vtc_weight: float | int = 1.0
    mbta_weight: float | int = 0.1
    mbca_weight: float | int = 0.1
    mbta_loss: Literal["cosine", "mse"] = "cosine"
    mbta_pairing: Literal["matched", "released"] = "matched"
    gather_gradient: Literal["global", "released"] = "global"
    order_negatives: Literal["none", "reversed", "reversed_and_shuffled"] = "none"
    initializer_factor: float | int = 1.0

    def __post_init__(self, **kwargs):
        self.vision_config = _as_tower_config(self.vision_config)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Part of `@strict`-powered validation: checks the ranges of the pretraining fields."""
        if not 0 <= self.mask_ratio < 1:
            raise ValueError(f"mask_ratio={self.mask_ratio} must be in [0, 1).")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be positive.")
        for name in ("vtc_weight", "mbta_weight", "mbca_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative.")

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        # A native CLIPModel checkpoint becomes a dual encoder with a fresh branch.
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config.get("model_type") == "clip":
            config = {
                **config,
                "model_type": cls.model_type,
                "vision_config": _as_tower_config(config.get("vision_config") or {}, "clip"),
            }
        return config, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As in transformers; keyword arguments that are fields of the tower's config are passed on to it, so that
        `from_pretrained(clip, adapter_layers=[20, 21, 22, 23], mask_ratio=0.5)` says all in one call."""
        return super().from_dict(with_fields(cls, config_dict, kwargs), **kwargs)


AutoConfig.register(BTAdapterVisionConfig.model_type, BTAdapterVisionConfig, exist_ok=True)
AutoConfig.register(BTAdapterConfig.model_type, BTAdapterConfig, exist_ok=True)
