"""Tables of JSON with a row that Arrow cannot hold: read one by one, so that only that row is lost."""

import codecs
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from ..adapters.writing import no_character
from .files import PEEK_BYTES, identity, open_file, parsed_json
from .readers import clean_texts


if TYPE_CHECKING:
    import datasets

PROBLEM = "problem"  # column of what is wrong with a row

# Of a list the reader of `datasets` drops them, which would change the text.
_LONE_SURROGATE = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)


def is_list_with_surrogates(path: str) -> bool:
    """Whether a file is a list, which is read as a whole anyway, with texts that hold halves of characters."""
    with open_file(path, PEEK_BYTES) as file:
        if not file.read(PEEK_BYTES).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            return False
        file.seek(0)
        return _LONE_SURROGATE.search(file.read()) is not None


def fields_of(paths: list[str]) -> list[str]:
    """The fields of all rows that are objects, in the order in which they come."""
    return list(dict.fromkeys(name for row in _rows(paths) if isinstance(row, dict) for name in row))


def read_rows(paths: list[str], video_columns: list[str], text_column: str) -> "datasets.Dataset":
    """The rows with their texts as a list, and with what is wrong with each in a column of its own."""
    import datasets

    features = datasets.Features(
        {
            **dict.fromkeys(video_columns, datasets.Value("string")),
            text_column: datasets.List(datasets.Value("string")),
            PROBLEM: datasets.Value("string"),
        }
    )
    # the identities are part of the name under which `datasets` keeps the result; lists would be shards to it
    what = {"paths": tuple(paths), "identities": tuple(map(identity, paths)), "columns": (*video_columns, text_column)}
    return datasets.Dataset.from_generator(_records, features=features, gen_kwargs=what)


def _records(paths: tuple[str, ...], identities: tuple, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    *video_columns, text_column = columns
    for row in _rows(paths):
        found = dict.fromkeys([*video_columns, PROBLEM]) | {text_column: []}
        try:
            if isinstance(row, ValueError):
                raise row
            if not isinstance(row, dict):
                raise ValueError(f"It is a {type(row).__name__}, and no object with fields")
            for name in video_columns:
                if row.get(name) is not None:
                    found[name] = _text(name, row[name])
            found[text_column] = [_text(text_column, text) for text in clean_texts(row.get(text_column))]
        except ValueError as error:
            found[PROBLEM] = f"{str(error).rstrip('.')}."
        yield found


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"Its {name} is {value!r}; expected text")
    if problem := no_character(value):
        raise ValueError(f"Its {name} {problem}")
    return value


def _rows(paths: Iterable[str]) -> Iterator[Any]:
    """What the files hold, row by row; a ValueError in the place of a line that is no JSON."""
    for path in paths:
        with open_file(path) as file:
            head = file.read(PEEK_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()
            file.seek(0)
            if head.startswith(b"["):
                yield from parsed_json(file.read().decode("utf-8-sig"))
                continue
            for number, line in enumerate(file):
                line = line.removeprefix(codecs.BOM_UTF8) if number == 0 else line
                if line.strip():
                    yield _parsed(line)


def _parsed(line: bytes) -> Any:
    try:
        return parsed_json(line)
    except ValueError as error:
        return ValueError(f"It is no JSON: {error}")
