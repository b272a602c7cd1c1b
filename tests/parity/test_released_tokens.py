"""Tokenisation and the released truncation, on CLIP's own vocabulary, which the wheel of open_clip carries."""

import gzip
import importlib.util
import json
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from bt_adapter_hf.conversion import released_token_ids
from tests.parity.golden import FOLDER


pytest.importorskip("ftfy")
OPEN_CLIP = importlib.util.find_spec("open_clip")


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    if OPEN_CLIP is None:
        pytest.skip("needs the vocabulary inside open_clip_torch")
    path = Path(OPEN_CLIP.submodule_search_locations[0], "bpe_simple_vocab_16e6.txt.gz")
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    # Bytes in the order of GPT-2's table: the printable ones first, then the others as characters from 256 on.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge) for merge in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: n for n, word in enumerate(words)}, merges=merges)


def test_golden_ids(tokenizer):
    rows = json.loads((FOLDER / "tokenize.json").read_text())["rows"]
    cut = 0
    for row in rows:
        ids = released_token_ids(tokenizer, [row["text"]], row["length"])
        assert ids.shape == (1, row["length"])
        expected = row["ids_without_trailing_zeros"]
        assert ids[0].tolist() == expected + [0] * (row["length"] - len(expected)), row["text"]
        cut += expected[-1] != 49407
    assert cut, "no row shows the cut-off end token"


def test_more_than_77_tokens_keep_the_end_token_at_77_only(tokenizer):
    text = " ".join(["dog"] * 100)
    full, short = released_token_ids(tokenizer, [text], 77), released_token_ids(tokenizer, [text], 32)
    assert full[0, -1] == 49407 and 49407 not in short[0]
    assert full[0, :32].equal(short[0])


def test_length_is_checked(tokenizer):
    with pytest.raises(ValueError, match="between 1 and 77"):
        released_token_ids(tokenizer, ["a"], 78)
