"""CLIP's byte-pair encoding: text in, token ids out.

Sennrich et al., arXiv:1508.07909, on bytes as GPT-2 does it (Radford et al., 2019). A worked
example, "A lily-valley’s café" (`Tokenizer.encode` takes these steps):

    clean       a lily-valley's café                       fix Unicode, unescape HTML, lower case
    split       a | lily | - | valley | 's | café          words, marks, single digits, clitics
    bytes       caf + C3 A9 -> c a f Ã ©</w>               one printable character per byte;
                                                           </w> marks the end of a word
    merge       c a f Ã ©</w> -> c af Ã ©</w> -> ... -> cafÃ©</w>   most frequent pair first
    ids         [start] 320 10647 268 3136 568 15304 [end] 0 0 ...  padded with 0 to 77

OpenAI learned the merges, and we read them, in the order in which they were learned
(`assets/bpe_simple_vocab_16e6.txt.gz`, MIT licence, notice beside it).
"""

import functools
import gzip
import html
from pathlib import Path

import ftfy
import regex
import torch

from clip_min.errors import UserError

MERGES = Path(__file__).parent / "assets" / "bpe_simple_vocab_16e6.txt.gz"
VOCAB_SIZE = 49408  # 2 x 256 bytes + 48,894 merges + start + end
START, END = "<|startoftext|>", "<|endoftext|>"

# Alternatives in order: the two special tokens, English clitics, a run of letters, ONE digit
# (so "102" is three tokens), a run of anything else that is not a space.
WORDS = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)

# A printable character for each of the 256 bytes, so that merges can be plain text. A byte that is
# printable in Latin-1 stands for itself; the other 68 (controls, spaces, soft hyphen) get the
# characters from U+0100 on: the space, byte 0x20, becomes "Ġ". In this order, printable bytes
# first, they are the first 256 token ids.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
ALPHABET = {byte: chr(byte) for byte in PRINTABLE}
OTHERS = [byte for byte in range(256) if byte not in ALPHABET]
ALPHABET |= {byte: chr(256 + i) for i, byte in enumerate(OTHERS)}


class Tokenizer:
    """Text <-> token ids. Build one with `tokenizer()`, which reads the merges once."""

    def __init__(self, merges: Path = MERGES):
        # The first line is a comment, and the file has more merges than the vocabulary uses.
        lines = gzip.decompress(merges.read_bytes()).decode("utf-8").split("\n")
        pairs = [tuple(line.split()) for line in lines[1 : 1 + VOCAB_SIZE - 2 * 256 - 2]]
        letters = list(ALPHABET.values())
        vocabulary = [*letters, *(letter + "</w>" for letter in letters)]
        vocabulary += ["".join(pair) for pair in pairs] + [START, END]
        self.ids = {word: i for i, word in enumerate(vocabulary)}
        self.rank = {pair: i for i, pair in enumerate(pairs)}
        self.cache = {START: [self.ids[START]], END: [self.ids[END]]}

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without start and end: "a rose." -> [320, 3568, 269]."""
        # Repair mojibake, unescape HTML (twice: scraped text often needs it), collapse spaces.
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
        text = regex.sub(r"\s+", " ", text).strip().lower()
        return [i for word in WORDS.findall(text) for i in self.merge(word)]

    def merge(self, word: str) -> list[int]:
        """Ids of a word: of its bytes, after all merges."""
        if word not in self.cache:
            parts = [ALPHABET[byte] for byte in word.encode("utf-8")]
            parts[-1] += "</w>"
            while len(parts) > 1:  # join the best-ranked neighbours, everywhere they occur
                pairs = zip(parts, parts[1:], strict=False)
                best = min(pairs, key=lambda pair: self.rank.get(pair, 1e9))
                if best not in self.rank:
                    break
                merged, i = [], 0
                while i < len(parts):
                    size = 2 if tuple(parts[i : i + 2]) == best else 1
                    merged.append("".join(parts[i : i + size]))
                    i += size
                parts = merged
            self.cache[word] = [self.ids[part] for part in parts]
        return self.cache[word]

    def decode(self, ids: list[int]) -> str:
        """Back to text: [320, 3568, 269] -> "a rose . " (a space ends every word)."""
        words = list(self.ids)
        byte = {letter: b for b, letter in ALPHABET.items()}
        letters = "".join(words[i] for i in ids)
        return (
            bytes(byte[letter] for letter in letters)
            .decode("utf-8", "replace")
            .replace("</w>", " ")
        )


tokenizer = functools.cache(Tokenizer)  # CLIP's own: `tokenizer()` reads the merges once


def tokenize(
    texts: str | list[str], context_length: int = 77, truncate: bool = False
) -> torch.Tensor:
    """Token ids of one text or several: int64 (K, context_length), padded with 0.

    Each row is [start] text [end] 0 … A text that does not fit is an error that names it; with
    `truncate` its tail is cut off before [end]. The result equals OpenAI's `clip.tokenize`.
    """
    texts = [texts] if isinstance(texts, str) else texts
    bpe = tokenizer()
    start, end = bpe.ids[START], bpe.ids[END]
    rows = torch.zeros(len(texts), context_length, dtype=torch.long)
    for row, text in zip(rows, texts, strict=True):
        ids = [start, *bpe.encode(text), end]
        if len(ids) > context_length and not truncate:
            shown = text if len(text) <= 300 else text[:300] + "…"  # it may be a whole file
            raise UserError(
                f"{shown!r} is {len(ids)} tokens long with its start and end, but the text tower "
                f"reads {context_length}: shorten it, or pass truncate=True"
            )
        if len(ids) > context_length:
            ids = [*ids[: context_length - 1], end]
        row[: len(ids)] = torch.tensor(ids)
    return rows
