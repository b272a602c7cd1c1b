"""MTEB's description of a dual encoder on the Hub, so that `mteb.get_model` and its video tasks take it.

MTEB samples frames itself, from the first to the last one, and loads models by Sentence Transformers.
"""

from typing import Any

from ..import_utils import require_package


def register_with_mteb(model_id: str, revision: str | None = None, name: str | None = None) -> Any:
    """Makes `mteb.get_model(name)` load a dual encoder; returns its `mteb.ModelMeta`.

    Args:
        model_id: Hub id, or folder, of a dual encoder with its processor, as `bt-adapter push` publishes it.
        revision: commit on the Hub.
        name: under which MTEB knows it, "organization/model"; the Hub id by default.

    Raises:
        ImportError: without `mteb` or `sentence_transformers`.
        ValueError: the model is no dual encoder, or a folder without a name.
    """
    require_package("mteb", "eval")
    require_package("sentence_transformers", "eval")
    from mteb.models import ModelMeta
    from mteb.models.model_implementations import MODEL_REGISTRY
    from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper

    from ..hub.dual_encoder import load_dual_encoder

    name = name or model_id
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise ValueError(f"name={name!r}: expected a name such as 'organization/model' for MTEB.")
    model, processor, commit = load_dual_encoder(model_id, revision)
    parameters = sum(parameter.numel() for parameter in model.parameters())

    def load(_: str, revision: str | None = None, device: str | None = None, **kwargs: Any) -> Any:
        return SentenceTransformerEncoderWrapper(model_id, revision=revision, device=device, **kwargs)

    meta = ModelMeta(
        loader=load,
        loader_kwargs={"num_frames": processor.video_processor.num_frames},
        name=name,
        revision=commit or "local",
        release_date=None,
        languages=["eng-Latn"],
        n_parameters=parameters,
        n_embedding_parameters=model.text_model.get_input_embeddings().weight.numel(),
        memory_usage_mb=round(parameters * model.dtype.itemsize / 2**20, 1),
        max_tokens=model.config.text_config.max_position_embeddings,
        embed_dim=model.config.projection_dim,
        license=None,
        open_weights=True,
        public_training_code=None,
        public_training_data=None,
        framework=["Sentence Transformers", "PyTorch"],
        similarity_fn_name="cosine",
        use_instructions=False,
        training_datasets=None,
        modalities=["text", "image", "video"],
    )
    MODEL_REGISTRY[name] = meta
    return meta
