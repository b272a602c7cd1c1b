"""(video, text) tables: one description for local files and Hub datasets, and the dataset that decodes them lazily."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..import_utils import require_package
from ..video_io import VideoError, load_video
from .broken import BrokenItem, BrokenItemsError


if TYPE_CHECKING:
    import datasets

    from ..processing_bt_adapter import BTAdapterProcessor


logger = logging.getLogger(__name__)

VIDEO_COLUMNS = ("video", "file_name", "path", "video_path")
TEXT_COLUMNS = ("text", "caption", "captions", "sentence", "sentences")
# Reader of `datasets` and its options for each kind of table file.
READERS = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    # Captions and file names are text: "None", "NA" and "null" are words here.
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t"}),
    ".parquet": ("parquet", {}),
}
# Attempts to replace a broken item before a table is declared unusable.
REPLACEMENTS = 100


@dataclass
class PairTable:
    """Rows of (video, text), nothing decoded.

    Attributes:
        source: what was given to `load_table`.
        rows: the `datasets.Dataset` with the two columns.
        media_root: folder that relative video paths start from.
    """

    source: str
    rows: "datasets.Dataset"
    video_column: str
    text_column: str
    media_root: Path | None

    def __len__(self) -> int:
        return len(self.rows)

    def pair(self, index: int) -> tuple[str | bytes, str, list[str]]:
        """Video (path, URL or bytes of the file), its name for messages, and the texts of one row, maybe none."""
        row = self.rows[index]
        video, texts = row[self.video_column], row[self.text_column]
        if isinstance(video, dict):  # a Video feature that is not decoded
            name, video = video["path"], video["bytes"] or video["path"]
        else:
            name = video if isinstance(video, str) else None
        if isinstance(video, str) and video and "://" not in video and self.media_root is not None:
            video = str(self.media_root / video)
        texts = texts if isinstance(texts, list) else [texts]
        return video, name or f"row {index}", [str(text) for text in texts if text is not None and str(text).strip()]


def load_table(
    source: str | Path,
    *,
    media_root: str | Path | None = None,
    video_column: str | None = None,
    text_column: str | None = None,
    split: str = "train",
    config_name: str | None = None,
) -> PairTable:
    """Open a (video, text) table. The `datasets` library reads it; no video is decoded.

    Args:
        source: a `.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet` file; a folder of videos with `metadata.jsonl`,
            `metadata.csv` or `metadata.parquet` (the video folder layout of `datasets`); any other folder that
            `datasets` reads; or the id of a Hub dataset.
        media_root: where relative video paths start; the folder of the table by default.
        video_column: paths, URLs or `Video` features; by default the first of `VIDEO_COLUMNS` that exists.
        text_column: captions, or lists of captions; by default the first of `TEXT_COLUMNS` that exists.
        split, config_name: of a Hub dataset or a folder without metadata file.

    Raises:
        ImportError: without the `datasets` library.
        ValueError: for a table that cannot be read, has no rows, or lacks the columns (naming those it has).
    """
    require_package("datasets", "train")
    import datasets

    path = Path(source).expanduser()
    if path.is_dir():
        metadata = [path / f"metadata{suffix}" for suffix in READERS]
        path = next((file for file in metadata if file.is_file()), path)
    try:
        if path.is_file():
            if path.suffix not in READERS:
                raise ValueError(f"a file must end in one of {', '.join(READERS)}")
            reader, options = READERS[path.suffix]
            rows = datasets.load_dataset(reader, data_files=str(path), split="train", **options)
            media_root = media_root or path.parent
        elif path.is_absolute() and not path.exists():
            raise FileNotFoundError("no such file or folder")
        else:
            rows = datasets.load_dataset(str(source), config_name, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        raise ValueError(f"Cannot read the table {source}: {cause}") from error
    if len(rows) == 0:
        raise ValueError(f"The table {source} has no rows.")
    video_column = _pick_column(rows, video_column, VIDEO_COLUMNS, "video", source)
    text_column = _pick_column(rows, text_column, TEXT_COLUMNS, "text", source)
    rows = rows.select_columns([video_column, text_column])
    if isinstance(rows.features[video_column], datasets.Video):
        # We decode ourselves: a torchcodec that does not load must not matter.
        rows = rows.cast_column(video_column, datasets.Video(decode=False))
    return PairTable(
        source=str(source),
        rows=rows,
        video_column=video_column,
        text_column=text_column,
        media_root=Path(media_root).expanduser().resolve() if media_root is not None else None,
    )


def _pick_column(
    rows: "datasets.Dataset", wanted: str | None, defaults: tuple[str, ...], kind: str, source: str | Path
) -> str:
    for name in (wanted,) if wanted is not None else defaults:
        if name in rows.column_names:
            return name
    looked_for = repr(wanted) if wanted is not None else f"any of {', '.join(defaults)}"
    raise ValueError(
        f"The table {source} has no {kind} column: looked for {looked_for}, found {', '.join(rows.column_names)}. "
        f"Name it with {kind}_column."
    )


def random_crop_box(
    height: int, width: int, scale: tuple[float, float], generator: np.random.Generator
) -> tuple[int, int, int, int]:
    """`(top, left, height, width)` of a random crop: area a share of the frame drawn from `scale`, aspect 3/4 to 4/3.

    As released: ten tries, then the centre square.
    """
    for _ in range(10):
        area = height * width * generator.uniform(*scale)
        aspect = np.exp(generator.uniform(np.log(3 / 4), np.log(4 / 3)))
        box_height, box_width = round(np.sqrt(area / aspect)), round(np.sqrt(area * aspect))
        if 0 < box_height <= height and 0 < box_width <= width:
            top = generator.integers(height - box_height, endpoint=True)
            left = generator.integers(width - box_width, endpoint=True)
            return int(top), int(left), int(box_height), int(box_width)
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


class PairDataset(torch.utils.data.Dataset):
    """Map-style dataset over a `PairTable`: decodes, samples and preprocesses one video when it is asked for.

    All chance (which frames, which caption, which crop, what replaces a broken item) is a function of
    `(seed, epoch, index)`, so it does not depend on workers, processes or where a run was resumed.

    An item whose video or text cannot be used is replaced by another one, and reported in the item that replaces it.

    Args:
        table: the rows.
        processor: its video processor gives size, normalisation and, outside training, the rule for sampling frames.
        training: jittered frames and a random caption of each row, as released; otherwise the processor's sampling
            rule and the first caption.
        num_frames: frames per clip, T; the video processor's by default.
        seed: of all chance above.
        crop_scale: range of the area of a random resized crop, one box for all frames of a clip (released pretraining:
            0.08 to 1); none by default, which leaves the crop to the video processor. Training only.
        group_by_caption: rows with the same (first) caption are right answers for each other in retrieval. Otherwise
            every row is its own only right answer, as in the usual benchmarks.

    Items: `pixel_values_videos` float (T, 3, H, W), `text` str, `pair_id` int (what belongs together in retrieval; -1
    where the item replaces a broken one), `broken` list of `BrokenItem`.
    """

    def __init__(
        self,
        table: PairTable,
        processor: "BTAdapterProcessor",
        *,
        training: bool,
        num_frames: int | None = None,
        seed: int = 0,
        crop_scale: tuple[float, float] | None = None,
        group_by_caption: bool = False,
    ):
        self.table, self.training, self.seed = table, training, seed
        self.video_processor = processor.video_processor
        self.num_frames = num_frames if num_frames is not None else self.video_processor.num_frames
        if self.num_frames < 1:
            raise ValueError(f"num_frames={self.num_frames} must be at least 1.")
        if crop_scale is not None:
            if not training:
                raise ValueError("crop_scale is an augmentation: it can be used in training only.")
            if len(crop_scale) != 2 or not 0 < crop_scale[0] <= crop_scale[1] <= 1:
                raise ValueError(f"crop_scale={crop_scale} must be two areas, 0 < smallest <= largest <= 1.")
        self.crop_scale = crop_scale
        # Shared memory: workers that outlive an epoch must see the next one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._first_row_of: dict[str, int] | None = None
        if group_by_caption:
            self._first_row_of = {}
            for index in range(len(table)):
                for text in table.pair(index)[2][:1]:
                    self._first_row_of.setdefault(text, index)

    def __len__(self) -> int:
        return len(self.table)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose frames, captions and crops are drawn."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = np.random.default_rng([self.seed, int(self._epoch), index])
        broken: list[BrokenItem] = []
        for candidate in self._candidates(index, generator):
            video, name, texts = self.table.pair(candidate)
            try:
                if not texts:
                    raise _UnusableText("it has no text")
                text = texts[generator.integers(len(texts))] if self.training else texts[0]
                pixel_values = self._load(video, generator)
            except (VideoError, _UnusableText) as error:
                broken.append(
                    BrokenItem(source=self.table.source, index=candidate, video=name, reason=str(error) or repr(error))
                )
                continue
            pair_id = candidate if self._first_row_of is None else self._first_row_of[texts[0]]
            return {
                "pixel_values_videos": pixel_values,
                "text": text,
                "pair_id": -1 if broken else pair_id,
                "broken": broken,
            }
        raise BrokenItemsError(
            f"None of {len(broken)} items tried in a row of {self.table.source} can be used. The first: "
            f"{broken[0]['video']}: {broken[0]['reason']}"
        )

    def _candidates(self, index: int, generator: np.random.Generator) -> Iterator[int]:
        """The item itself, then replacements: a walk that meets every other item once."""
        yield index
        others = len(self) - 1
        if others:
            start = int(generator.integers(others))
            for step in range(min(others, REPLACEMENTS)):
                yield (index + 1 + (start + step) % others) % len(self)

    def _load(self, video: str | bytes, generator: np.random.Generator) -> torch.Tensor:
        frames, _ = load_video(
            video,
            num_frames=self.num_frames,
            sampling="jitter" if self.training else self.video_processor.sampling,
            backend=self.video_processor.video_backend,
            generator=generator,
            on_damage=self.video_processor.on_damage,
            background=self.video_processor.background,
        )
        frames = torch.from_numpy(frames).movedim(-1, 1)  # (T, H, W, 3) -> (T, 3, H, W)
        if self.crop_scale is not None:
            top, left, height, width = random_crop_box(*frames.shape[-2:], self.crop_scale, generator)
            size = self.video_processor.crop_size
            frames = torch.nn.functional.interpolate(
                frames[..., top : top + height, left : left + width],
                size=(size["height"], size["width"]),
                mode="bicubic",
                antialias=True,
            )
        batch = self.video_processor(videos=[frames], do_sample_frames=False, return_tensors="pt")
        return batch["pixel_values_videos"][0]


class _UnusableText(Exception):
    """The row has no text."""


class PairCollator:
    """Batches items of a `PairDataset` and tokenises their texts, cut at `max_text_length` tokens.

    Args:
        processor: its tokenizer is used.
        max_text_length: longest text in tokens, start and end tokens included; the tokenizer's limit by default.

    Batches: `pixel_values_videos` float (B, T, 3, H, W), `input_ids` and `attention_mask` int64 (B, longest text),
    `pair_ids` int64 (B), and `broken`, the list of `BrokenItem` met on the way.

    Raises:
        ValueError: if `max_text_length` exceeds the tokenizer's limit, or the tokenizer has none and none is given.
    """

    def __init__(self, processor: "BTAdapterProcessor", max_text_length: int | None = None):
        self.tokenizer = processor.tokenizer
        limit = self.tokenizer.model_max_length
        if max_text_length is None and limit > 10**6:
            raise ValueError("The tokenizer states no limit (model_max_length): give max_text_length.")
        if max_text_length is not None and not 0 < max_text_length <= limit:
            raise ValueError(
                f"max_text_length={max_text_length} must be between 1 and the tokenizer's limit of {limit}."
            )
        self.max_text_length = max_text_length or limit

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        texts = self.tokenizer(
            [item["text"] for item in items],
            padding=True,
            truncation=True,
            max_length=self.max_text_length,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return {
            "pixel_values_videos": torch.stack([item["pixel_values_videos"] for item in items]),
            "input_ids": texts["input_ids"],
            "attention_mask": texts["attention_mask"],
            "pair_ids": torch.tensor([item["pair_id"] for item in items]),
            "broken": [record for item in items for record in item["broken"]],
        }
