"""Tables of conversations about videos and images: rows, what they show, and where that lies."""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from glob import has_magic
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HTTPError
from PIL import Image

from ..adapters.writing import no_character
from ..hub.access import explain, http_cause, retried
from ..models.image_io import load_image
from ..models.video_errors import VideoAccessError, VideoError, VideoNotFoundError
from .addresses import Addresses, AddressReader, is_address
from .archives import ARCHIVE_SUFFIXES, MediaArchives
from .files import check_encoding, find_files, is_remote, join, parsed_json, repository, split_hub_path, unicode_reason
from .sources import NothingToFetch, PairTable
from .tgif_qa import TABLE_SUFFIXES, GifQuestion, read_tgif_qa


if TYPE_CHECKING:
    from .chunk_store import ChunkStore


# Where a VideoChatGPT row names a video without its ending.
VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".gif")

Messages = list[dict[str, Any]]


class UnusableRow(ValueError):
    """The row is no conversation that can be learned."""


@dataclass
class InstructionTable:
    """Rows of conversations, nothing decoded.

    Attributes:
        source: the file.
        rows: one JSON text per row, not parsed yet.
        media: folder that relative paths start from, the archives that hold them, or a list of their addresses.
        fingerprint: of the file's content.
        revision: commit of a file on the Hub, else None.
    """

    source: str
    rows: list[str]
    media: Path | MediaArchives | Addresses
    fingerprint: str
    revision: str | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def _fetched(self) -> PairTable | None:
        """The rows as a table of videos to be fetched; None where all is on the disk."""
        if not isinstance(self.media, Addresses) and not any(re.search(r'"https?://', row) for row in self.rows):
            return None
        return PairTable(self.source, AddressReader(len(self.rows), self.fingerprint, replace(self)._address_of), None)

    def _address_of(self, row: int) -> str | None:
        try:
            videos = visuals_of(self.messages(row), "video")
        except UnusableRow:  # reported when it is its turn
            return None
        return next(filter(is_address, videos), None)

    @property
    def needs_store(self) -> bool:
        """Whether videos are at addresses: training fetches them ahead, see `PairTable`."""
        return self._fetched is not None

    @property
    def store(self) -> "ChunkStore | None":
        return None if self._fetched is None else self._fetched.store

    @store.setter
    def store(self, store: "ChunkStore | None") -> None:
        self._fetched.store = store

    def use_store(self, *args: Any, **kwargs: Any) -> "ChunkStore | NothingToFetch":
        """As of a `PairTable`."""
        return NothingToFetch() if self._fetched is None else self._fetched.use_store(*args, **kwargs)

    def fetched(self, row: int, path: str) -> str | bytes:
        """A path of the messages of a row; or the video, where a store holds it. Waits until it does.

        Raises:
            VideoError: it could not be fetched.
        """
        if self.store is None or not is_address(path):
            return path
        record = self._fetched.record(row)
        if record.name != path:  # of several addresses the first is in the store
            return path
        if record.problem is not None:
            raise VideoAccessError(record.problem)
        return record.video

    @property
    def shard_rows(self) -> list[int]:
        return [len(self.rows)] if self._fetched is None else self._fetched.shard_rows

    def messages(self, row: int) -> Messages:
        """The conversation of a row, ending with an answer.

        What it shows is under "path", for `read`: a path from the root of the file system, a URL, or the name in the
        archives.

        Of a table on the Hub the paths lie below the folder of the media, whatever the table says.

        Raises:
            UnusableRow: if it is none, in words.
        """
        try:
            content = parsed_json(self.rows[row])
        except ValueError as error:
            raise UnusableRow(f"it is no JSON: {error}") from error
        if not isinstance(content, dict):
            raise UnusableRow(f"it is a {type(content).__name__}, and no object with fields.")
        if "messages" in content:
            messages = content["messages"]
        elif {"q", "a", "video_id"} <= content.keys():
            messages = self._video_chatgpt(content, row)
        elif "tgif_qa" in content:  # of `_tgif_qa`
            if content["tgif_qa"] is not None:
                raise UnusableRow(content["tgif_qa"])
            path = self._with_ending(self._place(content["gif"]), usual=".gif")
            seen = [{"type": "video", "path": path}, {"type": "text", "text": content["question"]}]
            messages = [{"role": "user", "content": seen}, {"role": "assistant", "content": content["answer"]}]
        else:
            raise UnusableRow(
                f"it has the fields {', '.join(content) or 'none'}; expected messages, or q, a and video_id."
            )
        return self._checked(messages)

    def videos(self) -> Iterator[str]:
        """Paths and URLs of the videos of all usable rows, each once."""
        seen = set()
        for row in range(len(self)):
            try:
                messages = self.messages(row)
            except UnusableRow:
                continue  # reported when it is its turn
            for video in visuals_of(messages, "video"):
                if video not in seen:
                    seen.add(video)
                    yield video

    @property
    def archives(self) -> MediaArchives | None:
        """The archives that hold the videos, if any do."""
        return self.media if isinstance(self.media, MediaArchives) else None

    def read(self, path: str) -> str | bytes:
        """What `load_video` takes for a path of `messages`; see `read_media`."""
        return read_media(path, self.archives)

    def _with_ending(self, path: str, usual: str = VIDEO_SUFFIXES[0]) -> str:
        """The file of a video that is named without its ending; without a file the usual name, for the report."""
        if self.archives is not None or is_address(path) or Path(path).suffix in VIDEO_SUFFIXES:
            return path
        names = [path + suffix for suffix in (usual, *VIDEO_SUFFIXES)]
        return next((name for name in names if Path(name).is_file()), names[0])

    def _place(self, path: str) -> str:
        if isinstance(self.media, Addresses) and not is_remote(path):
            name = PurePosixPath(path)
            name = name.stem if name.suffix in VIDEO_SUFFIXES else name.name
            if name not in self.media.by_name:
                raise UnusableRow(f"{path} is not in the list of addresses {self.media.source}.")
            return self.media.by_name[name]
        if path.startswith("data:") or (self.archives is not None and not is_remote(path)):
            return path  # the content itself, or a name in the archives
        folder = str(self.media) if isinstance(self.media, Path) else None
        within = None if self.revision is None else [folder] if folder else []
        try:
            found = join(folder, path, within)
        except VideoError as error:
            raise UnusableRow(str(error)) from error
        if found.startswith("hf://"):
            raise UnusableRow(f"{path} is on the Hub; what conversations show is read from the disk: download it.")
        return found

    def _video_chatgpt(self, content: Mapping[str, Any], row: int) -> Messages:
        """As released, the video stands behind the question in even rows and before it in odd ones."""
        path = self._with_ending(self._place(str(content["video_id"])))
        video = {"type": "video", "path": path}
        for field in ("q", "a"):
            if not isinstance(content[field], (str, int, float)):
                raise UnusableRow(f"its {field} is {content[field]!r}; expected text.")
        question = {"type": "text", "text": str(content["q"])}
        return [
            {"role": "user", "content": [question, video] if row % 2 == 0 else [video, question]},
            {"role": "assistant", "content": str(content["a"])},
        ]

    def _checked(self, messages: Any) -> Messages:
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise UnusableRow("messages is no list of objects with role and content.")
        roles = [message.get("role") for message in messages]
        turns = roles[1:] if roles[:1] == ["system"] else roles
        if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
            raise UnusableRow(
                f"its roles are {', '.join(map(str, roles)) or 'none'}; expected user and assistant by turns, from a "
                "user to an assistant, after at most one system message."
            )
        return [{"role": m["role"], "content": self._parts(m["role"], m.get("content"))} for m in messages]

    def _parts(self, role: str, content: Any) -> list[dict[str, str]]:
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list):
            raise UnusableRow(f"the content of a message is {content!r}; expected text, or a list of parts.")
        checked = []
        for part in parts:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind in ("image_url", "video_url"):  # as OpenAI writes them
                url = part.get(kind)
                part = {"url": url.get("url") if isinstance(url, dict) else url}
                kind = kind.removesuffix("_url")
            if kind == "text" and isinstance(part.get("text"), str):
                checked.append({"type": "text", "text": part["text"]})
            elif kind in ("image", "video") and role == "user":
                keys = (kind, "path", "url")  # a data set fills those that a part lacks with None
                where = [part[key] for key in keys if isinstance(part.get(key), str) and part[key]]
                if len(where) != 1:
                    raise UnusableRow(f"a part of type {kind} needs a path or a url, and has {', '.join(part)}.")
                checked.append({"type": kind, "path": self._place(where[0])})
            else:
                raise UnusableRow(
                    f"a message of the {role} has the part {json.dumps(part)}; expected text, and of the user images "
                    "and videos."
                )
        text = "".join(part.get("text", "") for part in checked)
        if not text.strip():
            raise UnusableRow(f"a message of the {role} has no text.")
        if problem := no_character(text):
            raise UnusableRow(f"a message of the {role} {problem}.")
        return checked


def read_media(path: str, archives: MediaArchives | None = None) -> str | bytes:
    """The bytes of a member of archives; paths of files and URLs as they are.

    Raises:
        VideoError: if no archive holds it, also with one of the usual endings of videos, or it cannot be read.
    """
    if archives is None or is_remote(path):
        return path
    for name in (path, *(path + suffix for suffix in VIDEO_SUFFIXES)):
        with contextlib.suppress(VideoNotFoundError):
            return archives.read(name)
    raise VideoNotFoundError(f"{path} is not in {', '.join(archives.paths)}.")


def load_instructions(
    source: str | Path, *, media_root: str | Path | None = None, revision: str | None = None
) -> InstructionTable:
    """Open a table of conversations; rows are parsed when they are asked for.

    Two kinds of rows, in a `.jsonl` file (one per line) or a `.json` file (a list of them):

    - `{"messages": [{"role": "user", "content": [{"type": "video", "path": "clip.mp4"}, {"type": "text", "text":
      "What happens?"}]}, {"role": "assistant", "content": "A dog jumps."}]}`: any number of turns, images too, with or
      without a system message; `"url"`, `"video"` or `"image"` in place of `"path"`;
    - `{"q": ..., "a": ..., "video_id": ...}`, VideoChatGPT-100K's: the video is `<media_root>/<video_id>` with one of
      the endings .mp4, .webm, .mkv, .avi, .gif.

    A table of TGIF-QA, a `.csv` or `.tsv` file, works as it is: each question is a conversation about one GIF, see
    `GifQuestion`.

    Videos may be at http(s) addresses: in training they are fetched ahead, in bounded disk.

    Args:
        source: the file: a path, or `hf://datasets/owner/name[@revision]/path`, which is downloaded.
        media_root: where relative paths start: a folder on the disk, or a `.zip` or `.tar` with the videos (or a
            pattern that fits several), which are read where they are; or a list of addresses, a `.tsv` or `.txt`
            file, by the names of the files (TGIF's `tgif-v1.0.tsv`). The folder of the file by default.
        revision: branch, tag or commit of a file on the Hub.

    Raises:
        ValueError: for a file of another kind, one that cannot be read, or one without rows; for a `media_root` that
            is not there.
    """
    source, commit = str(source), None
    if not source.endswith((".json", ".jsonl", *TABLE_SUFFIXES)):
        raise ValueError(
            f"Cannot read the table {source}: a table of conversations is a .jsonl or a .json file, or a .csv or .tsv "
            "file of TGIF-QA."
        )
    try:
        path = Path(source).expanduser()
        if is_remote(source):
            path, commit = _download(source, revision)
        media = _open_media(path.parent if media_root is None and commit is None else media_root)
        content = path.read_bytes()
        check_encoding(content[:4])
        text = content.decode("utf-8-sig")
        if path.suffix == ".jsonl":
            rows = [line for line in text.split("\n") if line.strip()]
        elif path.suffix in TABLE_SUFFIXES:
            rows = [_tgif_qa(question) for question in read_tgif_qa(text, source)]
        else:
            rows = parsed_json(text)
            if not isinstance(rows, list):
                raise ValueError(f"it holds a {type(rows).__name__}, and no list of rows")
            rows = [json.dumps(row) for row in rows]
    except (OSError, ValueError, HTTPError) as error:
        reason = explain(error, repository(source), revision) if http_cause(error) else unicode_reason(error) or error
        raise ValueError(f"Cannot read the table {source}: {reason}") from error
    if not rows:
        raise ValueError(f"The table {source} has no rows.")
    return InstructionTable(
        source=source,
        rows=rows,
        media=media,
        fingerprint=hashlib.sha256(text.encode()).hexdigest(),
        revision=commit,
    )


def _tgif_qa(question: GifQuestion | str) -> str:
    """A question, or why there is none, as a row of a table."""
    if isinstance(question, str):
        return json.dumps({"tgif_qa": question})
    fields = {"gif": question.gif, "question": question.prompt, "answer": question.answer}
    return json.dumps({"tgif_qa": None, **fields}, ensure_ascii=False)


def _download(source: str, revision: str | None) -> tuple[Path, str]:
    """A table on the Hub: the local copy, and its commit."""
    repo, written, path = split_hub_path(source)
    if not path:
        raise ValueError(f"it is a repository; name a file in it, hf://datasets/{repo}/path")
    file = retried(
        lambda: hf_hub_download(repo, path, repo_type="dataset", revision=written or revision), f"Downloading {source}"
    )
    return Path(file), re.search(r"snapshots[/\\]([0-9a-f]{40})[/\\]", file)[1]


def _open_media(root: str | Path | None) -> Path | MediaArchives | Addresses:
    if root is None:
        raise ValueError("it is on the Hub: name the folder or the archives of its videos on the disk with media_root")
    if is_remote(str(root)):
        raise ValueError(
            f"the videos of conversations are read from the disk, again and again: download {root}, and name the "
            "folder or the archives with media_root"
        )
    folder = Path(root).expanduser()
    if folder.suffix in (".tsv", ".txt") and folder.is_file():
        return Addresses.read(folder)
    if not folder.is_dir() and (folder.suffix in ARCHIVE_SUFFIXES or has_magic(str(root))):
        return MediaArchives(find_files(str(root), ARCHIVE_SUFFIXES, "", None, None).paths)
    if not folder.is_dir():
        raise ValueError(f"media_root {root} is neither a folder nor a .zip or .tar file, nor a list of addresses")
    return folder.resolve()


def visuals_of(messages: Messages, *kinds: str) -> list[str]:
    """Paths and URLs of the images ("image") or videos ("video") of a conversation, in order."""
    return [part["path"] for message in messages for part in message["content"] if part["type"] in kinds]


def name_of(messages: Messages, row: int) -> str:
    """What a conversation shows, for messages."""
    seen = visuals_of(messages, "image", "video")
    return ", ".join(map(short, seen)) or f"row {row}"


def short(path: str) -> str:
    """A path as it is, a `data:` URL by its beginning."""
    return path if len(path) <= 200 else f"{path[:40]}..."


def open_image(table: InstructionTable, path: str) -> Image.Image:
    """An image of a conversation, decoded.

    Raises:
        VideoError: it cannot be had or decoded.
    """
    return load_image(table.read(path), f"The image {short(path)}")
