"""Benchmarks of retrieval and recognition as they are published: on the Hub, or as their authors give them out."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.media import Media
from .benchmark_files import BenchmarkFiles, field, number_field
from .clips import ListedClip, ListedClips
from .temporal_sets import rtime_hard


@dataclass(frozen=True)
class CaptionSet:
    """Where a benchmark of retrieval lies, and its protocol in the paper.

    Attributes:
        repo: dataset on the Hub; None where there is none.
        captions: patterns of the annotation file, the one on the Hub first.
        folders, archives: of the videos.
        paragraph: the captions of a video are joined.
        max_text_length: in tokens.
    """

    repo: str | None
    captions: tuple[str, ...]
    folders: tuple[str, ...]
    archives: tuple[str, ...]
    paragraph: bool
    max_text_length: int


RETRIEVAL_SETS = {
    # 1k-A: 1,000 clips with a caption each
    "msrvtt": CaptionSet(
        "friedrichor/MSR-VTT",
        ("*test_1k*.json", "**/*test_1k*.json", "*JSFUSION*.json", "**/*JSFUSION*.json"),
        ("MSRVTT_Videos", "videos/all", "videos", "video"),
        ("MSRVTT_Videos.zip", "*.zip"),
        False,
        32,
    ),
    "didemo": CaptionSet(
        "friedrichor/DiDeMo",
        ("*didemo_test*.json", "test.json", "**/test.json"),
        ("DiDeMo_Videos", "videos", "test"),
        ("*_test.tar", "*.tar", "*.zip"),
        True,
        77,
    ),
    "activitynet": CaptionSet(
        "friedrichor/ActivityNet_Captions",
        ("*val1*.json", "**/*val1*.json", "*val_1.json", "**/*val_1.json"),
        ("Activity_Videos", "ActivityNet_Videos", "videos"),
        ("*.zip", "*.tar"),
        True,
        77,
    ),
    "lsmdc": CaptionSet(
        None, ("lsmdc_test.json", "*publictect.csv"), ("videos", "avi"), ("*.tar", "*.zip"), False, 77
    ),
}
ENDINGS = (".mp4", ".webm", ".mkv", ".avi")


def open_retrieval_set(name: str, root: str | Path | None = None, media_root: str | Path | None = None) -> ListedClips:
    """One of `RETRIEVAL_SETS`, or "rtime-hard": a row for each video, with its captions.

    Args:
        root, media_root: see `BenchmarkFiles`.

    Raises:
        ValueError: an unknown name, or files that are not as published.
    """
    if name == "rtime-hard":
        return rtime_hard(BenchmarkFiles(name, None, root, media_root))
    if name not in RETRIEVAL_SETS:
        raise ValueError(
            f"There is no retrieval benchmark {name!r}; there are {', '.join(RETRIEVAL_SETS)}, and tables."
        )
    known = RETRIEVAL_SETS[name]
    files = BenchmarkFiles(name, known.repo, root, media_root)
    media = files.media(known.folders, known.archives)
    path = files.find(*known.captions)[0]
    texts_of: dict[str, list[str]] = {}
    for video, texts in _captions(files, path):
        texts_of.setdefault(video, []).extend(texts)
    clips = [ListedClip(media, _paths(video), tuple(texts)) for video, texts in texts_of.items()]
    return ListedClips(name, clips, files.revision)


def _captions(files: BenchmarkFiles, path: str) -> Iterator[tuple[str, list[str]]]:
    """Videos and captions, in any of the forms in which they are given out."""
    if path.endswith(".csv"):  # of LSMDC: no header; the clip comes first, the sentence last
        for line in files.lines(path):
            clip, tab, rest = line.partition("\t")
            if not tab:
                raise ValueError(f"{path} holds {line[:60]!r} where a clip and its sentence are expected, with tabs.")
            yield clip, [rest.rpartition("\t")[2]]
        return
    content = files.read(path)
    rows = content.items() if isinstance(content, dict) else [(None, row) for row in content]
    for video, row in rows:
        if video is None:
            video = field(row, ["video", "video_id"], path)
        if isinstance(row, dict):
            row = field(row, ["caption", "captions", "sentences", "sentence", "text"], path, empty=[])
        texts = [str(text).strip() for text in (row if isinstance(row, list) else [row])]
        yield str(video), [text for text in texts if text]


def _paths(video: str) -> tuple[str, ...]:
    if video.lower().endswith(ENDINGS):
        return (video,)
    movie = video.rpartition("_")[0]  # LSMDC has a folder for each film
    names = [f"{video}{ending}" for ending in ENDINGS]
    return (*names, *(f"{movie}/{name}" for name in names)) if movie else tuple(names)


RECOGNITION_SETS = ("k400", "hmdb51", "ucf101")


def open_recognition_set(
    name: str, root: str | Path | None = None, media_root: str | Path | None = None
) -> tuple[ListedClips, list[str]]:
    """One of `RECOGNITION_SETS` in its authors' layout: a row for each video with its label, and all labels.

    HMDB51 and UCF101 are read in their first split. Labels are words: "brush_hair" and "ApplyEyeMakeup" are written
    apart.

    Args:
        root, media_root: see `BenchmarkFiles`.

    Raises:
        ValueError: an unknown name, or files that are not as published.
    """
    readers = {"k400": _k400, "hmdb51": _hmdb51, "ucf101": _ucf101}
    if name not in readers:
        raise ValueError(f"There is no recognition benchmark {name!r}; there are {', '.join(readers)}, and tables.")
    files = BenchmarkFiles(name, None, root, media_root)
    labelled, classes = readers[name](files)
    media: Media = files.media(("videos", "videos_val", "val", "UCF-101", "hmdb51_org", ""), ("*.zip", "*.tar"))
    clips = [ListedClip(media, paths, (label,)) for paths, label in labelled]
    if len(classes) < 2:
        raise ValueError(f"{name} names {len(classes)} classes, expected two or more.")
    return ListedClips(name, clips), classes


Labelled = list[tuple[tuple[str, ...], str]]


def _k400(files: BenchmarkFiles) -> tuple[Labelled, list[str]]:
    """mmaction's list, "path number", with a file of names; or DeepMind's csv with label and youtube_id."""
    path = files.find("*val_list*.txt", "val.txt", "*val*.csv", "**/*val*.csv")[0]
    if path.endswith(".csv"):
        labelled = []
        for place, row in enumerate(files.read(path)):
            times = "_".join(f"{int(number_field(row, key, path, place)):06d}" for key in ("time_start", "time_end"))
            label, clip = field(row, ["label"], path), f"{field(row, ['youtube_id'], path)}_{times}.mp4"
            labelled.append(((f"{label}/{clip}", clip), label))
        return labelled, sorted({label for _, label in labelled})
    names = [line.strip() for line in files.lines(files.find("*label_map*.txt", "class*.txt", "*classes*.txt")[0])]
    return [((name,), _numbered(names, number, path)) for name, number in _pairs(files, path)], names


def _ucf101(files: BenchmarkFiles) -> tuple[Labelled, list[str]]:
    path = files.find("testlist01.txt", "**/testlist01.txt")[0]
    classes = [_words(name) for _, name in _pairs(files, files.find("classInd.txt", "**/classInd.txt")[0])]
    videos = [line.split(" ")[0].strip() for line in files.lines(path)]
    return [((video, video.rpartition("/")[2]), _words(video.partition("/")[0])) for video in videos], classes


def _hmdb51(files: BenchmarkFiles) -> tuple[Labelled, list[str]]:
    """In the files of a split, 2 marks the clips of the test set."""
    labelled, classes = [], []
    for path in files.find("*_test_split1.txt", "**/*_test_split1.txt"):
        name = Path(path).name.removesuffix("_test_split1.txt")
        classes.append(_words(name))
        labelled += [((f"{name}/{video}", video), classes[-1]) for video, mark in _pairs(files, path) if mark == "2"]
    return labelled, classes


def _pairs(files: BenchmarkFiles, path: str) -> Iterator[tuple[str, str]]:
    for line in files.lines(path):
        left, _, right = line.strip().rpartition(" ")
        if not left:
            raise ValueError(f"{path} holds {line[:60]!r} where two words are expected.")
        yield left, right


def _numbered(names: list[str], number: str, path: str) -> str:
    if not number.isdigit() or int(number) >= len(names):
        raise ValueError(f"{path} has the label {number!r}; there are {len(names)} names, which count from 0.")
    return names[int(number)]


def _words(name: Any) -> str:
    """ "ApplyEyeMakeup" and "apply_eye_makeup" -> "apply eye makeup"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", name).lower()
