"""The files of a published benchmark, in the layout that it has on the Hub: there, or in a copy on the disk."""

import csv
import glob
import io
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HTTPError

from ..data.archives import MediaArchives
from ..data.files import FoundFiles, check_encoding, is_remote, open_file, pin, unicode_reason
from ..data.media import Media, open_media
from ..hub.access import explain, retried


VIDEO_ENDINGS = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".gif")


class BenchmarkFiles:
    """Annotations and videos below one root.

    Args:
        name: of the benchmark, for messages.
        repo: dataset on the Hub; None where there is none, and a copy is needed.
        root: a copy of it on the disk; by default the Hub is read, at the commit that its branch stands at.
        media_root: where the videos lie, see `load_table`, in place of the benchmark's own.

    Raises:
        ValueError: there is no such folder, or nothing on the Hub to read in its place.
    """

    def __init__(
        self, name: str, repo: str | None, root: str | Path | None = None, media_root: str | Path | None = None
    ):
        self.name, self.media_root, self.revision = name, media_root, None
        if root is not None:
            self.root = str(Path(root).expanduser().resolve())
            if not os.path.isdir(self.root):
                raise ValueError(f"data_root={root} is not a folder; expected a copy of {name}.")
        elif repo is None:
            raise ValueError(f"{name} is not on the Hub: name the folder of your copy with data_root.")
        else:
            try:
                self.root = pin(f"hf://datasets/{repo}").rstrip("/")
            except (OSError, HTTPError) as error:
                raise ValueError(
                    f"{name} cannot be read from the Hub: {explain(error, repo)}. With a copy of it on the disk, name "
                    "its folder with data_root."
                ) from error
            self.revision = self.root.rpartition("@")[2]

    def find(self, *patterns: str) -> list[str]:
        """Paths from the root, of the first pattern that fits any.

        Raises:
            ValueError: none does.
        """
        for pattern in patterns:
            if is_remote(self.root):
                from huggingface_hub import HfFileSystem

                whole = f"{self.root}/{pattern}".removeprefix("hf://")
                files = [f"hf://{file}" for file in retried(lambda: HfFileSystem().glob(whole), f"Listing {whole}")]  # noqa: B023
            else:
                files = glob.glob(pattern, root_dir=self.root, recursive=True)
            if files:
                return sorted(file.removeprefix(f"{self.root}/") for file in files)
        raise ValueError(f"{self.name} has no file {' or '.join(patterns)} in {self.root}.")

    def lines(self, path: str) -> list[str]:
        """The lines of a text file that are not empty.

        Raises:
            ValueError: it is not UTF-8.
        """
        with open_file(f"{self.root}/{path}") as file:
            content = file.read()
        try:
            check_encoding(content)
            return [line for line in content.decode("utf-8-sig").splitlines() if line.strip()]
        except ValueError as error:
            raise ValueError(f"{self.root}/{path} cannot be read: {unicode_reason(error) or error}") from error

    def read(self, path: str) -> Any:
        """The content of an annotation file: of `.json` whatever it holds, else a list of rows.

        Raises:
            ValueError: it cannot be read as what its name says.
        """
        whole = f"{self.root}/{path}"
        if path.endswith(".parquet"):
            import pyarrow
            import pyarrow.parquet

            try:
                with open_file(whole) as file:
                    return pyarrow.parquet.read_table(file).to_pylist()
            except pyarrow.ArrowException as error:
                raise ValueError(f"{whole} is no parquet file that can be read: {error}") from error
        with open_file(whole) as file:
            content = file.read()
        try:
            check_encoding(content)
            text = content.decode("utf-8-sig")
            if path.endswith(".json"):
                content = json.loads(text)
                if not isinstance(content, list | dict):
                    raise ValueError(f"it holds {text.strip()[:40]!r} where a list or an object is expected")
                return content
            if path.endswith(".jsonl"):
                return [json.loads(line) for line in text.split("\n") if line.strip()]
            if path.endswith((".csv", ".tsv")):
                delimiter = "\t" if "\t" in text.partition("\n")[0] else ","
                return list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter))
        except (ValueError, csv.Error, RecursionError) as error:
            raise ValueError(f"{whole} cannot be read: {unicode_reason(error) or error}") from error
        raise ValueError(f"{whole} is neither .json, .jsonl, .csv, .tsv nor .parquet.")

    def media(self, folders: Sequence[str] = ("",), archives: Sequence[str] = ()) -> Media:
        """The videos: below the media root that the user gave, in one of these folders, in archives, or in the root.

        Raises:
            ValueError: none of them is there.
        """
        if self.media_root is not None:
            return open_media(FoundFiles([], "", self.root), self.media_root)
        for folder in folders:
            if not is_remote(self.root) and os.path.isdir(f"{self.root}/{folder}"):
                return Media(f"{self.root}/{folder}".rstrip("/"), within=[self.root])
        try:
            found = self.find(*archives) if archives else None
        except ValueError:
            found = None
        if found is not None:
            return Media(None, MediaArchives([f"{self.root}/{path}" for path in found]))
        if not is_remote(self.root) and any(path.suffix in VIDEO_ENDINGS for path in Path(self.root).iterdir()):
            return Media(self.root, within=[self.root])  # beside the tables
        if is_remote(self.root) and not archives:
            return Media("/".join(filter(None, (self.root, folders[0]))), within=[self.root])
        places = [repr(place) for place in (*folders, *archives)]
        raise ValueError(
            f"The videos of {self.name} are not in {' or '.join(places)} of {self.root}: name their folder or archive "
            "with media_root."
        )


def field(row: Any, names: Sequence[str], where: str, empty: Any = None) -> Any:
    """The value of the first of these fields that the row has.

    Args:
        empty: of a row that has the field and nothing in it, which is the fault of that row alone.

    Raises:
        ValueError: it has none of them.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{where} holds {str(row)[:60]!r} where a row with {' or '.join(names)} is expected.")
    for name in names:
        if row.get(name) is not None:
            return row[name]
    if empty is not None and any(name in row for name in names):
        return empty
    raise ValueError(f"A row of {where} has no {' or '.join(names)}; it has {', '.join(map(str, row))}.")


def number_field(row: Any, name: str, where: str, place: int) -> float:
    """The finite number in this field of the row at this place.

    Raises:
        ValueError: there is none.
    """
    found = field(row, [name], where)
    try:
        value = float(found)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"Row {place} of {where} has {str(found)[:60]!r} in {name!r} where a number is expected.")
    return value
