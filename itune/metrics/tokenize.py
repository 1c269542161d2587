"""Split a caption into words as the COCO caption evaluation does, without its Java process; count n-grams.

The COCO code runs Stanford's `PTBTokenizer -preserveLines -lowerCase` (CoreNLP 3.4.1), then drops punctuation. The
rules below follow the Penn Treebank; their details follow that program's output. Published scores contain even its
apparent mistakes, so they are kept: brackets become words such as `-lrb-` (it lower-cases before it looks for `-LRB-`),
runs such as `!!` stay, vowel signs of some scripts and emoji disappear, and scripts without spaces are not split.
Known differences: a grave accent or an opening quote for an apostrophe (won`t, O‘Neil), and a compound with a time
(5p.m.-ish). On purpose, letters that are newer than Unicode 6.1, which the program ignores, are letters here.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from ..runtime.retrieval.consensus import MAX_ORDER, NGram, ngrams

Pair = tuple[Sequence[str], Sequence[Sequence[str]]]
"""The words of a caption, and of each of its references."""

_HYPHENS = "\u058a\u2010\u2011"
"""These join words; elsewhere the program ignores them."""
# The COCO list without the capital bracket names, which no lower-cased token equals; with quotes in any spelling.
PUNCTUATION = frozenset(["'", "`", "’", "‘", '"', ".", "?", "!", ",", ":", "-", ";", *_HYPHENS, "\u066b", "\u066c"])

_ENTITY = re.compile("&(?:amp|lt|gt|quot|apos|nbsp);")
# The program's lexer lists the characters beyond ASCII that it knows; these classes are those of its output for each
# character of the Basic Multilingual Plane. It ignores all others, but for letters and digits.
_MARKS = (  # parts of words: accents, vowel signs
    r"\u02c2-\u02c5\u02d2-\u02df\u02e5-\u02eb\u02ed\u02ef-\u036f\u0375\u0378\u0379\u0384\u0385\u03f6"
    r"\u0483-\u0487\u055a-\u055f\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0615-\u061a\u064b-\u065e"
    r"\u0670\u06d6-\u06e4\u06e7-\u06ed\u06fd\u06fe\u070f\u0711\u0730-\u074c\u07a6-\u07b0\u07eb-\u07f3"
    r"\u0900-\u0903\u093c\u093e-\u094e\u0951-\u0955\u0962\u0963\u0981-\u0983\u09bc\u09be-\u09cd\u09d7"
    r"\u09e2\u09e3\u0a01-\u0a03\u0a3c-\u0a4f\u0a81-\u0a83\u0abc\u0abe-\u0acf\u0b82\u0bbe-\u0bcd\u0c01-\u0c03"
    r"\u0c3e-\u0c56\u0d3e-\u0d48\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ecd"
)
_SYMBOLS = (  # words of their own
    r"\u00a1\u00a5-\u00a9\u00ac\u00ae-\u00b4\u00b6-\u00b9\u00bf\u00d7\u00f7\u037e\u0387\u0589\u05be\u05c0\u05c3"
    r"\u05c6\u05f3-\u0603\u0606-\u060c\u0614\u061b\u061e\u061f\u066a\u066d\u06d4\u0700-\u070d\u07f6-\u07f8"
    r"\u0964\u0965\u0e3f\u0e4f\u1fbd\u2016\u2017\u201a\u201e-\u2023\u2030-\u2038\u203b\u203e-\u2042\u2070"
    r"\u2074-\u207e\u2080-\u208e\u20a4\u2100\u2101\u2103-\u2106\u2108\u2109\u2114\u2116-\u2118\u211e-\u2123"
    r"\u2125\u2127\u2129\u212e\u213a\u213b\u2140-\u2144\u214a-\u214d\u214f\u2155-\u215e\u2190-\u2bff\u3001\u3002"
    r"\u3012\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65\uffe0\uffe1\uffe5\uffe6"
)
_IN_WORDS = re.compile(f"[\0-\x7f’‘⁄{_HYPHENS}\u066b\u066c{_MARKS}]")
_SYMBOL = re.compile(f"[{_SYMBOLS}]")


class _Spelling(dict[int, str]):
    """What each character becomes before the text is split, as a table for `str.translate`."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        letter = unicodedata.category(character) in ("Lu", "Ll", "Lt", "Lm", "Lo", "Nd") and code < 0x10000
        if letter or _IN_WORDS.match(character):
            self[code] = character
        else:
            self[code] = f" {character} " if _SYMBOL.match(character) else " "
        return self[code]


_SPELLING = _Spelling(
    str.maketrans(
        {
            **dict.fromkeys("“”«»\x93\x94", '"'),
            **dict.fromkeys("‛‹›\x91\x92", " ' "),
            **dict.fromkeys("–—―\x96\x97", " - "),
            "…": " . ",
            **dict.fromkeys("€\u20a0¤\x80", " $ "),
            "£": " # ",
            "¢": " cents ",
            "¼": " 1/4 ",
            "½": " 1/2 ",
            "¾": " 3/4 ",
            "⅓": " 1/3 ",
            "⅔": " 2/3 ",
            "\u00ad": "",  # a soft hyphen is no part of its word
        }
    )
)
# A curly apostrophe stays in its word (o’neil), but clitics get straight ones ('s).
_CLITIC = re.compile("n’t|’(?:s|ll|ve|re|m|d)")
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


_W = rf"(?:[^\W_]|[{_MARKS}])"  # a letter or digit
_L = rf"(?:[^\W\d_]|[{_MARKS}])"  # a letter
_PLAIN = r"[^\W_]+(?:_+[^\W_]+)*"  # letters and digits without marks
_COMPOUND = rf"(?:[-{_HYPHENS}]{_PLAIN}|(?<=[a-z0-9])/[a-z0-9]+|(?<=\d)/\d+)"  # snow-covered, and/or, 1/2, mid-1990s
_END = rf"(?!{_W})"
_POINT = r"[.,:⁄\u066b\u066c]"
_TOKEN = re.compile(
    "|".join(  # the first rule that matches wins
        [
            r"https?://[^\s<>\"]*[^\s<>\".,;:!?)']",
            rf"{_W}[\w.+-]{{0,63}}@[\w-]+(?:\.\w+)*",  # an e-mail address
            rf"@[a-z]\w*|#(?:{_L})+",
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
            rf"(?:ma['’]am|n?e['’]er|c'mon|s'mores){_END}|ol['’]{_END}|[jy]['’](?=(?:{_L}){{2}})|[jl]['’](?=(?![sdmt]){_L}{_END})",
            rf"[ol]['’](?:{_W}){{2,}}|d['’](?:{_L}){{2,}}|qu['’][aeiou](?:{_W})*|[nc]['’]est{_END}",
            rf"(?:{_L})+(?<=[aeiou])['’][aeiou](?:{_W})*",
            r"(?<=\w)’(?:s|ll|ve|re|m|d)",  # even before more letters: g 'd ay
            # Periods that belong to their word.
            rf"(?:{_any_of(_ABBREVIATIONS)}|(?-i:{_any_of(_STATES)}))\.{_END}",
            rf"(?:{_any_of(_NUMBERED)})\.(?=\s*\d)",
            rf"(?:{_PLAIN}-)*[a-z](?:\.[a-z])+\.{_END}{_COMPOUND}*",  # U.S.-based
            rf"[a-z]\.{_END}(?=\s*\S)(?!\s+(?-i:{_any_of(_OPENERS)})\b)",  # J. Smith
            rf"{_L}(?:{_W})*(?:[.?!]{_L}(?:{_W})*)+{_COMPOUND}*",  # example.com, and a stop without a space
            # Numbers and words.
            rf"[-+]?(?:\.\d+|\d+(?={_POINT}\d))(?:{_POINT}\d+)*(?:-{_PLAIN})*|[-+]\d+{_END}",  # 1,000  10:30  3.5-inch
            r"(?-i:[A-Z]+(?:&[A-Z]+)+)|(?:us|a|c)\$",  # AT&T, US$
            rf"{_PLAIN}{_COMPOUND}+|\d[^\W_]*|{_L}(?:{_W})*(?:_+{_PLAIN})*",
            r"[?!]{2,}|-{5,}|\*+|_+|#+|<<|>>|\S",
        ]
    ),
    re.IGNORECASE,
)


def split_words(text: str) -> list[str]:
    """Split any text into lower-case words without punctuation; the list may be empty."""
    text = _ENTITY.sub(lambda entity: html.unescape(entity[0]), text)
    text = text.translate(_SPELLING)
    tokens = (_BRACKETS.get(token, token.lower()) for token in _TOKEN.findall(text))
    return [
        token.replace("’", "'") if _CLITIC.fullmatch(token) else token for token in tokens if token not in PUNCTUATION
    ]


def count_ngrams(tokens: Sequence[str]) -> Counter[NGram]:
    """Count the n-grams of 1 to 4 words in a caption."""
    return Counter(ngram for order in range(1, MAX_ORDER + 1) for ngram in ngrams(tokens, order))
