"""The words of receipts and reports, one line each: `--explain` prints them, docs/receipts.md lists
them.

Knows words. Refuses to know how a number is measured (see verify).
"""

from __future__ import annotations

from collections.abc import Mapping

PAGE = "docs/receipts.md"

RECEIPT_WORDS: dict[str, str] = {
    "wanted, unwanted": (
        "the new object and the old one; for neighbours, their own object and the new one"
    ),
    "right": "the wanted answer is more probable than the unwanted one, by the mean over tokens",
    "p(wanted)": "mean probability of the whole wanted answer, before → after the edit",
    "efficacy": "share of the edit's own prompts that are right",
    "paraphrase": "share of other wordings of the edited fact that are right",
    "neighbourhood": (
        "share of prompts about other subjects that are right; the check counts those that were "
        "right before"
    ),
    "neighbourhood+": (
        "neighbourhood, with the edit's own sentence in front of each prompt; the check is the "
        "number right after the edit over the number right before it, from 3 on"
    ),
    "says": "greedy decoding, which always takes the most probable token, writes the wanted answer",
    "overruns its neighbours": (
        "with the edit's own sentence in front, less than half as many neighbours are right as "
        "before the edit"
    ),
    "none given, not checked": (
        "the edit's facts have no such prompts: Fact(paraphrases=, neighbours=), or a data set's "
        "facts, bring them"
    ),
    "perplexity ratio": (
        "how badly the model predicts half a page of unrelated prose, after the edit over before "
        "it; 1: no change"
    ),
    "norm ratio": "length of the change over length of the weight, of the weight changed most",
    "rho": (
        "ROME only: how well the edit's prompt matches the contexts it was computed in; 1 is good, "
        "near 0 the change explodes"
    ),
    "rounding": "share of the change that is lost where the weight's number format cannot hold it",
}

REPORT_WORDS: dict[str, str] = {
    "n": "number of records",
    "greedy": "the model writes by itself, always the most probable token",
    "teacher-forced": (
        "the answer is given token by token and only its probability is read: easier than saying it"
    ),
    "(in brackets)": "half the width of the 95 % interval of the mean over records",
    "↑ ↓": "which way is better",
    "bold": "better than every other method beyond chance",
    "beyond chance": (
        "the 95 % interval of the difference on the same records, at least 20, excludes 0"
    ),
}


def explained(words: Mapping[str, str]) -> list[str]:
    """Return a line for each word: the word, and what it means.

    Example:
        >>> from engram.evaluate.words import explained
        >>> explained({"n": "number of records", "bold": "better beyond chance"})
        ['n     number of records', 'bold  better beyond chance']
    """
    width = max(map(len, words))
    return [f"{word:<{width}}  {meaning}" for word, meaning in words.items()]
