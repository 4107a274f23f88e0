"""The word-level tokenizer of the bundled models and, with more words, of all tasks.

A piece is a two-digit number, a single digit, a word, a triple quote, a newline or one mark of punctuation; spaces separate
pieces and are no tokens. A year such as 1743 is therefore two tokens, ``17`` and ``43``. ``<bos>`` is put in front of every
text. Decoding sets spaces as in print, so that encoding a decoded text gives the same ids.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.datasets.words import data, own_files, template, word_kinds, words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PATTERN = r"\d{2}|\d|[^\W\d]+|\"\"\"|\n|[^\w\s]"
SPECIAL = ("<bos>", "<pad>", "<unk>")
_PUNCTUATION = tuple(".,:;?!()\"'-=")


def pieces(text: str) -> list[str]:
    """The pieces of a text, in order; one token each if they are in the vocabulary."""
    return re.findall(PATTERN, text)


@cache
def vocabulary() -> tuple[str, ...]:
    """Every token in id order: those of ``base_vocabulary()``, then the words of the tasks that keep a file of their
    own. Ids of the base never change; those after it do when a task is added, so a model keeps its own tokenizer."""
    found: dict[str, None] = dict.fromkeys(base_vocabulary())
    for task in own_files():
        for text in _strings(data(task)):
            found |= dict.fromkeys(pieces(re.sub(r"\{\w+\}", " ", text)))
    return tuple(found)


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for child in children for text in _strings(child)]


@cache
def base_vocabulary() -> tuple[str, ...]:
    """The tokens of the bundled language models in id order: specials, punctuation, numbers 00 to 99, digits, then the
    words that these models know."""
    found: dict[str, None] = dict.fromkeys((*SPECIAL, *_PUNCTUATION, '"""', "\n"))
    found |= dict.fromkeys(f"{number:02d}" for number in range(100))
    found |= dict.fromkeys("0123456789")
    for kind in word_kinds():
        found |= dict.fromkeys(words(kind))
    for text in (*_frames(), "def self param A The In Q"):
        found |= dict.fromkeys(pieces(re.sub(r"\{\w+\}", " ", text)))
    return tuple(found)


def _frames() -> list[str]:
    from workbench.datasets.corpus import FRAMES

    colored = template("colored-objects")
    needle = template("needle")
    return [
        *FRAMES,
        *template("ioi"),
        template("greater-than"),
        *colored["openings"],
        colored["scene"],
        colored["question"],
        template("docstring"),
        needle["fact"],
        needle["question"],
    ]


def build(tokens: Sequence[str] | None = None) -> Any:
    """A ``tokenizers.Tokenizer`` over ``tokens``, which start with the special ones; over ``vocabulary()`` by default."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    vocab = {token: index for index, token in enumerate(vocabulary() if tokens is None else tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PATTERN), "removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", vocab["<bos>"])]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(Regex(r"^(?=[\w<(=\-])"), " "),
            decoders.Fuse(),
            decoders.Replace(Regex(r"(?<=\(|\n|^) "), ""),
            decoders.Replace(Regex(r"(?<=\b\d\d) (?=\d\d\b)"), ""),
        ]
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


@cache
def word_tokenizer(tokens: tuple[str, ...] | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of ``build(tokens)`` as transformers knows it, with ``<bos>``, ``<pad>`` and ``<unk>`` set."""
    return _wrap(tokenizer_object=build(tokens))


def load(path: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a ``tokenizer.json`` written by ``save``."""
    return _wrap(tokenizer_file=str(path))


def save(path: str | Path) -> Path:
    """Write the ``tokenizer.json`` of the bundled language models."""
    build(base_vocabulary()).save(str(path))
    return Path(path)


def _wrap(**source: Any) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        **source,
        bos_token="<bos>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
