"""The same twelve clips with captions in every form in which a dataset may lie on the Hub."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np

from tests import tiny_pairs
from tests.data.packed import add_member, rows_of


ROWS = 12
PART = 2  # rows of each parquet row group, parquet file and tar


class Clips:
    """Clips and captions, made once.

    Attributes:
        rows: (bytes of the video, caption) of each row.
    """

    def __init__(self, folder: Path):
        tiny_pairs.write_table(folder, ROWS)
        self.rows = [(video, text) for _, video, text in rows_of(folder)]

    def parquet(self, fat: int = 0) -> dict[str, bytes]:
        """Files of `PART` rows; `fat`: bytes per row of a column that nobody asked for."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        generator, files = np.random.default_rng(0), {}
        for start in range(0, ROWS, PART):
            rows = self.rows[start : start + PART]
            table = {"video": [video for video, _ in rows], "text": [text for _, text in rows]}
            if fat:
                table["features"] = [generator.bytes(fat) for _ in rows]
            with io.BytesIO() as file:
                pq.write_table(pa.table(table), file, row_group_size=PART, compression="none")
                files[f"data/train-{start // PART:05d}-of-{ROWS // PART:05d}.parquet"] = file.getvalue()
        return files

    def tars(self) -> dict[str, bytes]:
        """WebDataset tars of `PART` samples."""
        files = {}
        for start in range(0, ROWS, PART):
            with io.BytesIO() as file:
                with tarfile.open(fileobj=file, mode="w") as tar:
                    for i in range(start, start + PART):
                        video, text = self.rows[i]
                        add_member(tar, f"clip{i:03d}.mp4", video)
                        add_member(tar, f"clip{i:03d}.txt", text.encode())
                files[f"shards/{start // PART:05d}.tar"] = file.getvalue()
        return files

    def videos(self) -> dict[str, bytes]:
        return {f"clip{i}.mp4": video for i, (video, _) in enumerate(self.rows)}

    def video_folder(self) -> dict[str, bytes]:
        lines = [json.dumps({"file_name": f"clip{i}.mp4", "text": text}) for i, (_, text) in enumerate(self.rows)]
        return {**self.videos(), "metadata.jsonl": "\n".join(lines).encode()}

    def csv(self, prefix: str) -> dict[str, bytes]:
        """A table that names each clip by an address."""
        lines = ["video,text", *(f"{prefix}/clip{i}.mp4,{text}" for i, (_, text) in enumerate(self.rows))]
        return {"train.csv": "\n".join(lines).encode()}


def put(hub, clips: Clips, form: str, repo_id: str) -> None:
    """Puts the clips on a Hub, in one of `FORMS`."""
    urls = f"{hub.url}/datasets/{repo_id}-videos/resolve/main"
    paths = f"hf://datasets/{repo_id}-videos"
    files = {
        "parquet": clips.parquet,
        "tars": clips.tars,
        "video folder": clips.video_folder,
        "csv of URLs": lambda: clips.csv(urls),
        "csv of hf:// paths": lambda: clips.csv(paths),
    }[form]()
    hub.put_files(repo_id, files, repo_type="dataset")
    if form.startswith("csv"):
        hub.put_files(f"{repo_id}-videos", clips.videos(), repo_type="dataset")


def options(form: str, repo_id: str) -> dict[str, str]:
    """What `load_table` needs to know of a form: where the videos are that it may name."""
    return {"media_root": f"hf://datasets/{repo_id}-videos"} if form == "csv of hf:// paths" else {}


FORMS = ("parquet", "tars", "video folder", "csv of URLs", "csv of hf:// paths")
