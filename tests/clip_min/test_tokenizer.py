"""Token ids are OpenAI's for whatever people type, paste or scrape."""

import random
import re
import unicodedata

import clip
import pytest
import torch
from clip.clip import _tokenizer as openai_bpe
from clip.simple_tokenizer import basic_clean, whitespace_clean

import clip_min.tokenizer
from clip_min import UserError, tokenize
from clip_min.tokenizer import ALPHABET, END, START, VOCAB_SIZE, Tokenizer, tokenizer
from clip_min.tokenizer import WORDS as WORDS_OF_TEXT

SCRIPTS = [  # first and last code point
    *[(0x20, 0x7E), (0x00, 0x1F), (0x7F, 0x9F), (0xA0, 0xFF), (0x100, 0x24F), (0x250, 0x2AF)],
    *[(0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x52F), (0x530, 0x58F), (0x590, 0x5FF)],
    *[(0x600, 0x6FF), (0x700, 0x74F), (0x900, 0x97F), (0x980, 0x9FF), (0xB80, 0xBFF)],
    *[(0xE00, 0xE7F), (0x0F00, 0x0FFF), (0x10A0, 0x10FF), (0x1100, 0x11FF), (0x1200, 0x137F)],
    *[(0x13A0, 0x13FF), (0x1780, 0x17FF), (0x1800, 0x18AF), (0x1E00, 0x1EFF), (0x1F00, 0x1FFF)],
    *[(0x2000, 0x206F), (0x2070, 0x209F), (0x20A0, 0x20CF), (0x2100, 0x214F), (0x2150, 0x218F)],
    *[(0x2190, 0x21FF), (0x2200, 0x22FF), (0x2460, 0x24FF), (0x2500, 0x257F), (0x2600, 0x27BF)],
    *[(0x3000, 0x303F), (0x3040, 0x30FF), (0x3130, 0x318F), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3)],
    *[(0xE000, 0xE0FF), (0xF900, 0xFAFF), (0xFB00, 0xFB4F), (0xFE00, 0xFE0F), (0xFE70, 0xFEFF)],
    *[(0xFF00, 0xFFEF), (0xFFF0, 0xFFFF), (0x10330, 0x1034A), (0x1D400, 0x1D7FF)],
    *[(0x1F000, 0x1F0FF), (0x1F1E6, 0x1F1FF), (0x1F300, 0x1F6FF), (0x1F900, 0x1FAFF)],
    *[(0x20000, 0x2A6DF), (0xE0020, 0xE007F), (0x10FFF0, 0x10FFFF)],
]
EMOJI = ["👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇫🇷", "❤️‍🔥", "1️⃣", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "😀", "👨🏿‍🚀", "\u200d", "\ufe0f"]
ENTITIES = ["&amp;", "&lt;b&gt;", "&amp;amp;", "&amp;lt;", "&amp;amp;lt;", "&#39;", "&#x1F600;"]
ENTITIES += ["&nbsp;", "&eacute", "&notanentity;", "&#0;", "&#xD800;", "&amp;#39;s", "&quot;", "&"]
CLITICS = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "’s", "ʼt", "`ll", "'S", "'RE", "'ſ", "''d"]
WORDS = ["flower", "Photo", "ROSE", "İstanbul", "straße", "ΣΊΣΥΦΟΣ", "naïve", "café", "ﬁn", "Ǆ"]
WORDS += ["snapdragon", "o", "antidisestablishmentarianism", "x" * 40, "e\u0301te\u0301", "日本"]
SPECIAL = [START, END, START.upper(), "<|endoftext|", "<|", "|>", "</w>", "<|startoftext|>" * 2]
SPACES = [" ", "  ", "\t", "\n", "\r\n", "\xa0", "\u2003", "\u200b", "\x1c", "\x85", "\u3000", ""]


def piece(rng: random.Random) -> str:
    """One piece of text of any kind."""
    kind = rng.randrange(12)
    if kind == 0:
        script = rng.choice(SCRIPTS)
        return "".join(chr(rng.randint(*script)) for _ in range(rng.randint(1, 12)))
    if kind == 1:
        return "".join(chr(rng.randint(*rng.choice(SCRIPTS))) for _ in range(rng.randint(1, 4)))
    if kind == 2:
        unit = rng.choice(["", "%", "th", ",5", "½"])
        return str(rng.randrange(10 ** rng.randint(1, 9))) + unit
    if kind == 3:  # UTF-8 read as something else, once or twice
        text = rng.choice(["café", "“rose”", "naïve – ça", "日本", "😀", "Übergröße", "it’s"])
        for _ in range(rng.randint(1, 2)):
            text = text.encode("utf-8").decode(rng.choice(["latin-1", "cp1252"]), "replace")
        return text
    if kind == 4:
        return rng.choice(WORDS) + rng.choice(CLITICS) + rng.choice(["", "s", *CLITICS])
    if kind == 5:
        return unicodedata.normalize(rng.choice(["NFD", "NFKC"]), rng.choice(WORDS + EMOJI))
    if kind == 6:  # what no dictionary has: ASCII noise
        return "".join(chr(rng.randint(33, 126)) for _ in range(rng.randint(1, 20)))
    if kind == 7:  # words and halves of words that the merges know, run together
        text = openai_bpe.decode([rng.randrange(VOCAB_SIZE - 2) for _ in range(3)])
        return text.replace(" ", rng.choice(["", " "]))
    return rng.choice(rng.choice([EMOJI, ENTITIES, SPECIAL, WORDS]))


def any_texts(n: int, seed: int) -> list[str]:
    """n texts, from empty to far more than 77 tokens; the first ones are the corner cases."""
    rng = random.Random(seed)
    texts = ["", " ", "\n\t ", "\u200b", "\0", "'", "''''", "&", "0", "½", "\ufeff", "\ufffd", "Ⅷ²"]
    texts += [EMOJI[0], START, END, f"a{START}b{END}c", "DON'T", "rock'n'roll", "'tis", "x" * 5000]
    while len(texts) < n:
        count = 40 if rng.random() < 0.06 else rng.choice([1, 1, 2, 3, 5, 8])
        usual = rng.choice(SPACES)
        spaces = [usual if rng.random() < 0.8 else rng.choice(SPACES) for _ in range(count)]
        texts.append("".join(piece(rng) + space for space in spaces))
    return texts


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return any_texts(11_000, seed=0)


@pytest.fixture(scope="module")
def oracle(texts) -> torch.Tensor:
    return clip.tokenize(texts, truncate=True).long()


def test_the_texts_of_this_file_are_many_and_varied(texts, oracle):
    """So that the comparisons below compare something."""
    assert len(set(texts)) > 10_000
    assert len(set("".join(texts))) > 4_000
    assert len(oracle.unique()) > 10_000
    assert (oracle[:, -1] > 0).sum() > 500  # that fill the context


def test_ids_equal_openais(texts, oracle):
    assert torch.equal(tokenize(texts, truncate=True), oracle)
    fits = (oracle[:, -1] == 0).nonzero()[:2000, 0]
    assert torch.equal(tokenize([texts[i] for i in fits]), oracle[fits])


def test_what_is_too_long_for_openai_is_too_long_for_us(texts, oracle):
    full = [text for text, row in zip(texts, oracle, strict=True) if row[-1] > 0][:200]
    full += ["rose " * n for n in (74, 75, 76)]
    outcomes = set()
    for text in full:
        try:
            clip.tokenize(text)
            tokenize(text)
            outcomes.add("fits")
        except RuntimeError:
            with pytest.raises(UserError):
                tokenize(text)
            outcomes.add("too long")
    assert outcomes == {"fits", "too long"}


def test_a_shorter_context_equals_openais(texts):
    for length in (2, 3, 16):
        oracle = clip.tokenize(texts[:500], length, truncate=True)
        assert torch.equal(tokenize(texts[:500], length, truncate=True), oracle.long())


def test_every_letter_of_unicode_equals_openais():
    """In words of 48; of unassigned, private and CJK code points, which are alike, every 50th."""

    def alike(letter: str) -> bool:
        return unicodedata.category(letter) in ("Cn", "Co") or "\u3400" <= letter < "\ud7a4"

    letters = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]  # no surrogates
    letters = [letter for i, letter in enumerate(letters) if i % 50 == 0 or not alike(letter)]
    assert len(letters) > 50_000
    bpe = tokenizer()
    for i in range(0, len(letters), 48):
        text = "".join(letters[i : i + 48])
        assert bpe.encode(text) == openai_bpe.encode(text), ascii(text)


def test_one_text_and_no_texts():
    assert torch.equal(tokenize("a rose."), clip.tokenize("a rose.").long())
    assert tokenize([]).shape == clip.tokenize([]).shape == (0, 77)
    assert tokenize("a rose.").dtype == torch.int64


def test_a_lone_surrogate_is_treated_as_openai_treats_it():
    for text in ("\ud800", "a \udfff b", "\ud83d\ude00"):  # the last is a pair: an emoji
        assert tokenizer().encode(text) == openai_bpe.encode(text)


@pytest.mark.parametrize("words", [76, 400])
def test_a_text_too_long_is_an_error_that_names_it_and_its_length(words):
    text = " ".join(["rose"] * words)
    with pytest.raises(RuntimeError, match="too long"):
        clip.tokenize(text)
    with pytest.raises(UserError, match=rf"'rose rose.*' is {words + 2} tokens.* 77") as error:
        tokenize(["short", text])
    assert "\n" not in str(error.value)
    assert text[:300] in str(error.value)
    assert len(str(error.value)) < 600  # a line stays a line, whatever arrived
    assert tokenize(" ".join(["rose"] * 75))[0, -1] == VOCAB_SIZE - 1  # 75 words fit


def test_decode_equals_openais_for_texts_and_for_any_ids(texts):
    rng = random.Random(1)
    some = [openai_bpe.encode(text) for text in texts[:1000]]
    some += [[rng.randrange(VOCAB_SIZE) for _ in range(20)] for _ in range(500)]  # broken UTF-8
    for ids in some:
        assert tokenizer().decode(ids) == openai_bpe.decode(ids)


def test_decoding_gives_the_text_back():
    for text in ("a photo of a rose .", "lily - valley 's café", "1 0 2 flowers , 日本 👩‍👩‍👧‍👦"):
        assert tokenizer().decode(tokenizer().encode(text)).rstrip() == text


def test_the_cache_changes_nothing(texts):
    """A new tokenizer, one that has seen it all, and one that saw it in another order agree."""
    used, other = Tokenizer(), Tokenizer()
    some = texts[:700]
    first = [used.encode(text) for text in some]
    for text in reversed(some):
        other.encode(text)
    assert first == [used.encode(text) for text in some] == [other.encode(text) for text in some]
    ids = used.encode("rose")
    ids.append(0)  # a caller may do with its ids as it likes
    assert used.encode("rose") == openai_bpe.encode("rose")


def test_the_vocabulary_is_openais():
    assert tokenizer().ids == openai_bpe.encoder
    assert openai_bpe.byte_encoder == ALPHABET
    assert len(tokenizer().ids) == VOCAB_SIZE


def test_the_worked_example_at_the_top_of_the_file_is_true():
    doc = clip_min.tokenizer.__doc__
    text = re.search(r'example, "(.+?)"', doc)[1]
    line = dict(re.findall(r"^    (\w+) +(.+?)(?: {2,}.*)?$", doc, re.MULTILINE))
    cleaned = whitespace_clean(basic_clean(text)).lower()
    assert line["clean"] == cleaned
    words = line["split"].split(" | ")
    assert words == WORDS_OF_TEXT.findall(cleaned) == openai_bpe.pat.findall(cleaned)
    before, after = line["bytes"].split(" -> ")
    assert before == "caf + " + "é".encode().hex(" ").upper()
    letters = [openai_bpe.byte_encoder[byte] for byte in "café".encode()]
    assert after.split() == [*letters[:-1], letters[-1] + "</w>"]
    start, first, dots, last = line["merge"].split(" -> ")
    assert (start, dots) == (after, "...")
    ranks = openai_bpe.bpe_ranks
    best = min(zip(letters, after.split()[1:], strict=False), key=lambda p: ranks.get(p, 1e9))
    assert first == after.replace(" ".join(best), "".join(best), 1)
    assert last == openai_bpe.bpe("".join(letters))
    ids = [int(i) for i in re.findall(r"\d+", line["ids"].split("[end]")[0])]
    assert ids == openai_bpe.encode(text)


def test_the_examples_of_encode_and_decode_are_true():
    ids = [int(i) for i in re.findall(r"\d+", Tokenizer.encode.__doc__)]
    assert ids == openai_bpe.encode("a rose.")
    assert f"{ids} -> " in Tokenizer.decode.__doc__
    assert f'"{openai_bpe.decode(ids)}"' in Tokenizer.decode.__doc__
