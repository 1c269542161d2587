"""Split a caption into words as the COCO caption evaluation does, without its Java process; count n-grams.

The COCO code runs Stanford's `PTBTokenizer -preserveLines -lowerCase` (CoreNLP 3.4.1), then drops punctuation. The
rules below follow the Penn Treebank; their details follow that program's output. Published scores contain even its
apparent mistakes, so they are kept: brackets become words such as `-lrb-` (it lower-cases before it looks for `-LRB-`),
runs such as `!!` stay, and emoji disappear. Known differences: a grave accent or an opening quote for an apostrophe
(won`t, O‘Neil), and a compound with a time (5p.m.-ish).
"""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Sequence

from ..runtime.retrieval.consensus import MAX_ORDER, NGram, ngrams

Pair = tuple[Sequence[str], Sequence[Sequence[str]]]
"""The words of a caption, and of each of its references."""

# The COCO list without the capital bracket names, which no lower-cased token equals; with quotes in any spelling.
PUNCTUATION = frozenset(["'", "`", "’", "‘", '"', ".", "?", "!", ",", ":", "-", ";"])

_ENTITY = re.compile("&(?:amp|lt|gt|quot|apos|nbsp);")
_SPELLING = str.maketrans(
    {
        **dict.fromkeys("“”«»", '"'),
        **{digit: f" {digit} " for digit in "²³¹"},
        **dict.fromkeys("–—―", " - "),
        "…": " . ",
        "€": " $ ",
        "£": " # ",
        "¢": " cents ",
        "¼": " 1/4 ",
        "½": " 1/2 ",
        "¾": " 3/4 ",
        "\u00ad": "",  # a soft hyphen is no part of its word
        **dict.fromkeys("\u200b\ufe0f\ufeff", " "),
    }
)
# A curly apostrophe stays in its word (o’neil), but clitics get straight ones ('s).
_CLITIC = re.compile("n’t|’(?:s|ll|ve|re|m|d)")
_BEYOND_BMP = re.compile("[\U00010000-\U0010ffff]")
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}

# Abbreviations keep their period; "Pa." counts only with its capital, and "no." only before a number.
_ABBREVIATIONS = """
    mr mrs ms dr prof st mt sr jr esq sgt lt col gen capt maj sen rep gov pres rev hon messrs mme mlle adm atty cmdr
    ave blvd rd sq ct ste bldg dept univ est inc co corp ltd bros assn assoc plc cie intl natl insp supt treas
    jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri
    ala ariz calif colo conn dak fla ga ind kan kans ky mich minn mont neb nev okla penn tenn va vt wis wyo
    adj al asst brig cf cpl drs elec ens etc ext ft jos md mo pfc ph.d pvt rt spc vs wm
"""
_STATES = "Ark Del Ill La Mass Miss Ore Pa Tex Wash"
_NUMBERED = "art ca fig figs no nos op pp"
# These start a sentence after "plan b.". The COCO code also looks for them in the next line's caption; here a caption
# ends its sentence, so that its words do not depend on its neighbours.
_OPENERS = "A An As At But For He If In It One She Some That The Then There These They This We When You"


def _any_of(words: str) -> str:
    return "|".join(map(re.escape, words.split()))


_W = r"[^\W_][\u0300-\u036f]*"  # a letter or digit with the accents written after it
_L = r"[^\W\d_][\u0300-\u036f]*"  # a letter, likewise
_WORD = rf"(?:{_W})+(?:_+(?:{_W})+)*"
_COMPOUND = rf"(?:[-/]{_WORD})*"  # snow-covered, and/or, 1/2, mid-1990s
_END = rf"(?!{_W})"
_TOKEN = re.compile(
    "|".join(  # the first rule that matches wins
        [
            r"https?://[^\s<>\"]*[^\s<>\".,;:!?)']",
            rf"{_W}[\w.+-]{{0,63}}@[\w-]+(?:\.\w+)*",  # an e-mail address
            rf"[@#](?:{_L})\w*",
            rf"</?{_L}[^\s<>]*>",  # mark-up
            r"(?<!\w)(?:c\+\+|[cf]#)",  # programming languages
            # Clitics and the words they are attached to.
            rf"n['’]t{_END}",
            rf"['’](?:s|ll|ve|re|m|d){_END}",
            rf"['’]n['’]|['’]n{_END}",  # rock 'n' roll
            rf"(?<!\w)['’](?:em|cause|til|\d\ds?){_END}",
            rf"'t(?=(?:is|was){_END})",
            rf"can(?=not{_END})|(?:gon|wan)(?=na{_END})|got(?=ta{_END})|(?:gim|lem)(?=me{_END})",
            rf"(?:{_W})+?(?=n['’]t{_END})",
            # An apostrophe inside a word: O'Brien, d'Angelo, Hawai'i, and y' all.
            rf"(?:ma['’]am|n?e['’]er|c'mon|s'mores){_END}|ol['’]{_END}|[jy]['’](?=(?:{_L}){{2}})",
            rf"[ol]['’](?:{_W}){{2,}}|(?:d|qu)['’][aeiou](?:{_W})*|[nc]['’]est{_END}",
            rf"(?:{_L})+(?<=[aeiou])['’][aeiou](?:{_W})*",
            r"(?<=\w)’(?:s|ll|ve|re|m|d)",  # even before more letters: g 'd ay
            # Periods that belong to their word.
            rf"(?:{_any_of(_ABBREVIATIONS)}|(?-i:{_any_of(_STATES)}))\.{_END}",
            rf"(?:{_any_of(_NUMBERED)})\.(?=\s*\d)",
            rf"(?:{_WORD}-)*{_L}(?:\.{_L})+\.{_END}{_COMPOUND}",  # U.S.-based
            rf"{_L}\.{_END}(?=\s*\S)(?!\s+(?-i:{_any_of(_OPENERS)})\b)",  # J. Smith
            rf"{_L}(?:{_W})*(?:[.?!]{_L}(?:{_W})*)+{_COMPOUND}",  # example.com, and a stop without a space
            # Numbers and words.
            rf"[-+]?(?:\.\d+|\d+(?=[.,:]\d))(?:[.,:]\d+)*(?:-{_WORD})*|[-+]\d+{_END}",  # 1,000  10:30  3.5-inch
            r"(?-i:[A-Z]+(?:&[A-Z]+)+)|(?:us|a|c)\$",  # AT&T, US$
            rf"{_WORD}{_COMPOUND}",
            r"[?!]{2,}|-{5,}|\*+|_+|#+|<<|>>|\S",
        ]
    ),
    re.IGNORECASE,
)


def split_words(text: str) -> list[str]:
    """Split any text into lower-case words without punctuation; the list may be empty."""
    text = _ENTITY.sub(lambda entity: html.unescape(entity[0]), text)
    text = _BEYOND_BMP.sub(" ", text.translate(_SPELLING))
    tokens = (_BRACKETS.get(token, token.lower()) for token in _TOKEN.findall(text))
    return [
        token.replace("’", "'") if _CLITIC.fullmatch(token) else token for token in tokens if token not in PUNCTUATION
    ]


def count_ngrams(tokens: Sequence[str]) -> Counter[NGram]:
    """Count the n-grams of 1 to 4 words in a caption."""
    return Counter(ngram for order in range(1, MAX_ORDER + 1) for ngram in ngrams(tokens, order))
