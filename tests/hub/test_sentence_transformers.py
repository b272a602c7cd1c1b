"""A pushed dual encoder in Sentence Transformers and in MTEB, as they come."""

import shutil

import numpy as np
import pytest
import torch

from bt_adapter_hf.hub.remote_code import add_code
from bt_adapter_hf.hub.sentence_files import SENTENCE_NAMES, sentence_files
from bt_adapter_hf.search.encoding import VideoEncoder
from tests import tiny_pairs
from tests.evaluation import layouts


sentence_transformers = pytest.importorskip("sentence_transformers")


@pytest.fixture(scope="module")
def repository(tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("st") / "tiny"
    shutil.copytree(tiny_checkpoint, folder)
    for name, content in sentence_files(folder).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def model(repository):
    return sentence_transformers.SentenceTransformer(str(repository), device="cpu")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    paths = [layouts.clip(folder / "a.mp4"), folder / "b.gif", layouts.clip(folder / "c.mp4", 3)]
    frames = [layouts.Image.new("RGB", (32, 32), (50 * n, 90, 10)) for n in range(4)]
    frames[0].save(paths[1], save_all=True, append_images=frames[1:], duration=100)
    paths[2] = paths[2].rename(folder / "c.webm")
    return [str(path) for path in paths]


def test_features_are_ours_and_of_unit_length(model, repository, videos, tmp_path):
    encoder = VideoEncoder.from_pretrained(repository, device="cpu")
    found = model.encode([{"video": path} for path in videos])
    expected = np.stack([encoded.feature for encoded in encoder.encode_videos(videos)])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    texts = ["red goes left", "blue goes right"]
    np.testing.assert_allclose(model.encode(texts), encoder.encode_texts(texts), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(model.encode(texts), axis=1), 1, atol=1e-6)
    image = layouts.Image.new("RGB", (40, 30), (200, 10, 10))
    pixels = encoder.processor(images=image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        feature = encoder.model.get_image_features(pixels).pooler_output[0]
    np.testing.assert_allclose(model.encode([image])[0], feature / feature.norm(), atol=1e-6)
    assert model.similarity_fn_name == "cosine" and model.modalities == ["text", "image", "video"]
    model.save(str(tmp_path / "again"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "again"), device="cpu")
    np.testing.assert_allclose(again.encode([{"video": videos[0]}])[0], found[0], atol=1e-6)


def test_traps_that_the_page_names(model, videos):
    """When one of these fails, docs/evaluation.md tells of a trap that is gone."""
    as_video = model.encode([{"video": videos[1]}])
    assert np.abs(model.encode([videos[1]]) - as_video).max() > 1e-3  # a GIF by its path is an image
    assert model.max_seq_length == 24
    np.testing.assert_allclose(model.encode(["a" * 40]), model.encode(["a" * 60]), atol=1e-6)  # cut without a word
    assert np.abs(model.encode([videos[2]]) - model.encode([{"video": videos[2]}])).max() > 1e-3  # .webm is text


def test_code_of_the_repository(repository, model, tmp_path):
    shutil.copytree(repository, tmp_path / "coded")
    add_code(tmp_path / "coded")
    coded = sentence_transformers.SentenceTransformer(str(tmp_path / "coded"), device="cpu", trust_remote_code=True)
    np.testing.assert_allclose(coded.encode(["red goes left"]), model.encode(["red goes left"]), atol=1e-6)


def test_only_dual_encoders_get_them_and_only_once(repository, tmp_path):
    assert sentence_files(repository) == {}
    shutil.copytree(repository, tmp_path / "no-processor")
    for name in SENTENCE_NAMES:
        (tmp_path / "no-processor" / name).unlink()
    assert sentence_files(tmp_path / "no-processor").keys() == set(SENTENCE_NAMES)
    (tmp_path / "no-processor" / "processor_config.json").unlink()
    assert sentence_files(tmp_path / "no-processor") == {}


def test_mteb(repository, tmp_path, monkeypatch):
    """A local task of its text-to-video kind, with the stock wrapper."""
    mteb = pytest.importorskip("mteb")
    import datasets
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
    from mteb.abstasks.task_metadata import TaskMetadata

    from bt_adapter_hf.evaluation.mteb import register_with_mteb

    texts = ["red goes right", "green goes left", "blue goes right"]
    for number, colour in enumerate(("red", "green", "blue")):
        tiny_pairs.write_clip(tmp_path / f"{number}.mp4", tiny_pairs.COLOURS[colour], step=2, frames=9)

    class Local(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="LocalT2V", description="tiny", reference=None, dataset={"path": "local/tiny", "revision": "1"},
            type="Any2AnyRetrieval", category="t2v", modalities=["video", "text"], eval_splits=["test"],
            eval_langs=["eng-Latn"], main_score="ndcg_at_10", date=None, domains=None, task_subtypes=None,
            license=None, annotations_creators=None, dialect=None, sample_creation=None, bibtex_citation="",
        )  # fmt: skip

        def load_data(self, **_):
            ids = [str(number) for number in range(3)]
            corpus = datasets.Dataset.from_dict({"id": ids, "video": [str(tmp_path / f"{n}.mp4") for n in ids]})
            self.dataset = {"default": {"test": RetrievalSplitData(
                queries=datasets.Dataset.from_dict({"id": ids, "text": texts}),
                corpus=corpus.cast_column("video", datasets.Video()),
                relevant_docs={n: {n: 1} for n in ids}, top_ranked=None,
            )}}  # fmt: skip
            self.data_loaded = True

    meta = register_with_mteb(str(repository), name="local/tiny")
    assert meta.modalities == ["text", "image", "video"] and meta.embed_dim == 12
    model = mteb.get_model("local/tiny", device="cpu")
    result = mteb.evaluate(model, Local(), cache=None, encode_kwargs={"batch_size": 2})
    assert 0 < result.task_results[0].get_score() <= 1
    with pytest.raises(ValueError, match="organization/model"):
        register_with_mteb(str(repository))
