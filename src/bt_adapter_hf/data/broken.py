"""Bookkeeping of items that could not be used: counted, logged, listed in a file, and a limit that stops the run."""

import json
import logging
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TypedDict

from ..adapters.writing import printable, without_name


logger = logging.getLogger(__name__)

# The limit is a share of what was seen, but of at least this many items, so that one bad file among the first few does
# not stop a long run.
SMALLEST_SAMPLE = 100


class BrokenItem(TypedDict):
    """One row of a table that could not be used: the table, its row number, the name of its video, and why."""

    source: str
    index: int
    video: str
    reason: str


def broken_item(source: str, index: int, video: str, reason: str) -> BrokenItem:
    """With the reason as a sentence, so that another may follow."""
    reason = " ".join(reason.split()) or "It cannot be used"
    return BrokenItem(source=source, index=index, video=video, reason=reason.rstrip(".") + ".")


class BrokenItemsError(ValueError):
    """Too many items of a table are broken to go on."""

    def __init__(self, message: str):
        # A data loader worker hands its exceptions over with their traceback written into the message.
        worker = re.match(r"Caught BrokenItemsError in .*BrokenItemsError: (.*)", message, flags=re.DOTALL)
        super().__init__(worker.group(1).strip() if worker else message)


class BrokenItemsLog:
    """Counts the distinct broken items of one part of a run, lists them in a jsonl file, and stops at a limit.

    Args:
        path: the list; lines of this part already there (of a resumed run) are counted, and not written again.
        part: "train" or "eval"; the parts share a file.
        items: number of items in the table.
        max_broken: largest share of broken items among those seen so far (at least `SMALLEST_SAMPLE` of them, or the
            whole table where it is smaller), in 0-1.
        seen: items already seen by a resumed run.
    """

    def __init__(self, path: Path, part: str, items: int, max_broken: float = 0.1, seen: int = 0):
        if not 0 <= max_broken <= 1:
            raise ValueError(f"max_broken={max_broken} must be a share between 0 and 1.")
        self.path, self.part, self.items, self.max_broken, self.seen = Path(path), part, items, max_broken, seen
        self.broken: dict[tuple[str, int], BrokenItem] = {}
        if self.path.exists():
            _cut_to_whole_lines(self.path)
            for record in _records(self.path):
                if record.pop("part") == part:
                    self.broken[record["source"], record["index"]] = record

    def add(self, records: list[BrokenItem], seen: int) -> None:
        """Take in the broken items met while `seen` items of the table were loaded.

        Raises:
            BrokenItemsError: when the broken items exceed their share.
        """
        self.seen += seen
        fresh = {(record["source"], record["index"]): record for record in records}
        fresh = {key: record for key, record in fresh.items() if key not in self.broken}
        if not fresh:
            return
        self.broken.update(fresh)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"part": self.part, **record}) + "\n" for record in fresh.values())
        for record in fresh.values():
            logger.warning("Skipped %s", described(record))
        sample = min(max(self.seen, SMALLEST_SAMPLE), self.items)
        if len(self.broken) > self.max_broken * sample:
            last = list(fresh.values())[-1]
            raise BrokenItemsError(
                f"{len(self.broken)} of {min(self.seen, self.items)} items seen of {last['source']} are broken, more "
                f"than the allowed share of {self.max_broken:.0%}. They are listed with their reasons in {self.path}; "
                f"the last is {described(last)} Repair the table, or allow more with max_broken."
            )


def read_broken(output_dir: Path) -> dict[str, list[BrokenItem]]:
    """What all processes of a run have listed in its folder, by part ("train", "eval"): each item once."""
    found: dict[str, dict[tuple[str, int], BrokenItem]] = {}
    for path in sorted(Path(output_dir).glob("broken_items*.jsonl")):
        for record in _records(path):
            found.setdefault(record.pop("part"), {})[record["source"], record["index"]] = record
    return {part: list(records.values()) for part, records in found.items()}


def none_usable(source: str, broken: list[BrokenItem]) -> BrokenItemsError:
    """The error when neither an item nor what could replace it can be used."""
    return BrokenItemsError(
        f"None of {len(broken)} items tried in a row of {source} can be used. The first: {described(broken[0])}"
    )


def described(record: BrokenItem) -> str:
    """One line for people."""
    name, row = record["video"], f"row {record['index']}"
    reason = without_name(record["reason"], name)
    return printable(f"{row}: {reason}" if name == row else f"{name} ({row}): {reason}")


def count_reasons(records: Iterable[BrokenItem]) -> dict[str, int]:
    """How many items each reason accounts for, most frequent first. Names, paths and numbers are left out of it."""
    counts: Counter[str] = Counter()
    for record in records:
        reason = record["reason"].replace(record["video"] or "<path>", "<path>")
        counts[re.sub(r"\d+", "N", re.sub(r"\S*[/\\]\S*", "<path>", reason))] += 1
    return dict(counts.most_common())


def _cut_to_whole_lines(path: Path) -> None:
    """Drop a last line that a kill has cut short, before more is appended."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        path.write_bytes(whole)


def _records(path: Path) -> list[dict]:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
