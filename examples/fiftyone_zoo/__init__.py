"""A remote zoo source of FiftyOne: videos sorted by a sentence, here and in its app, with a BT-Adapter dual encoder.

import fiftyone as fo, fiftyone.brain as fob, fiftyone.zoo as foz
foz.register_zoo_model_source("https://github.com/YOUR_NAME/THE_CLONE")  # or the address of a zip of this folder
videos = fo.Dataset.from_videos_dir("videos")
fob.compute_similarity(videos, model="bt-adapter", brain_key="bt")
# of another model: model_kwargs={"model_id": "org/my-model", "device": "cuda"}
print(videos.sort_by_similarity("a dog catches a frisbee", k=5, brain_key="bt").values("filepath"))

From the disk: put this folder, or a link to it, into `fo.config.model_zoo_dir` under the name `bt-adapter-zoo`, in the
place of registering. FiftyOne runs in an environment that has bt_adapter_hf too. A video that cannot be read
is skipped with a warning.
"""

from pathlib import Path

import fiftyone.core.models as fom
import numpy as np

from bt_adapter_hf.search.encoding import VideoEncoder


def download_model(model_name: str, model_path: str | None) -> None:
    """FiftyOne wants a file. Loading fetches what is on the Hub, and the default model is inside the package."""
    Path(model_path).write_text("The weights are in the cache of the Hub, or in the package bt_adapter_hf.\n")


def load_model(model_name: str, model_path: str | None, model_id: str | None = None, **options) -> "BTAdapterZooModel":
    """The model; `model_id` is a dual encoder as `bt-adapter search --model` takes it."""
    return BTAdapterZooModel(VideoEncoder.from_pretrained(model_id, **options))


class BTAdapterZooModel(fom.Model, fom.EmbeddingsMixin, fom.PromptMixin):
    """Unit features of whole videos and of sentences."""

    media_type = "video"
    has_embeddings = True
    can_embed_prompts = True
    preprocess = False
    transforms = None
    ragged_batches = True

    def __init__(self, encoder: VideoEncoder):
        self.encoder = encoder

    def predict(self, reader):
        raise NotImplementedError("This model makes embeddings: use compute_similarity or compute_embeddings.")

    def embed(self, reader) -> np.ndarray:
        """Feature (P,) of a video; `reader` is FiftyOne's, of which only the path is needed."""
        (video,) = self.encoder.encode_videos([reader.inpath])
        if video.feature is None:
            raise ValueError(f"{video.path}: {video.error}")
        return video.feature

    def embed_prompt(self, text: str) -> np.ndarray:
        """Feature (P,) of a sentence."""
        return self.encoder.encode_texts([text])[0]

    def embed_prompts(self, texts: list[str]) -> np.ndarray:
        """Features (N, P) of sentences."""
        return self.encoder.encode_texts(texts)
