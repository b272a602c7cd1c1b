"""The released rule for cutting texts, for reproducing published numbers."""

import html
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from ..import_utils import require_package


_CONTEXT = 77


def released_token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int) -> torch.LongTensor:
    """Tokenises as the released evaluation does: ids (texts, length), padded with 0.

    A text is cleaned (ftfy, HTML entities), cut to 77 tokens with the end token kept, and then to `length` tokens
    *without* restoring the end token. The text tower then pools such a text at its largest token id. Lengths used: 32
    for MSR-VTT and class names, 77 for the other retrieval sets.

    Args:
        tokenizer: CLIP's tokenizer.
        texts: the captions.
        length: at most 77.

    Raises:
        ValueError: if `length` is outside 1..77.
        ImportError: if ftfy is not installed.
    """
    if not 1 <= length <= _CONTEXT:
        raise ValueError(f"length={length} must be between 1 and {_CONTEXT}.")
    require_package("ftfy", "eval")
    import ftfy

    cleaned = [html.unescape(html.unescape(ftfy.fix_text(text))).strip() for text in texts]
    rows = tokenizer(cleaned, truncation=True, max_length=_CONTEXT)["input_ids"]
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = torch.tensor(tokens[:length])
    return ids
