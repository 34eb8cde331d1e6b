"""Measure how many blanks a fill-in model restores: every 20th letter of an unseen text, one at a time.

The baseline are trigrams of the training text, from the left, and from both sides as the network reads:
argmax over c of n(l₂ l₁ c) · n(l₁ c r₁) · n(c r₁ r₂), with 1 added to each count n.

    charlm train --config fill.yaml --set corpus.source=quijote.txt --name fill
    python benchmarks/fill.py --corpus quijote.txt --model runs/fill
"""

import argparse
from collections import Counter
from pathlib import Path

import torch

from charlm.config import CorpusConfig
from charlm.inference.evaluate import CHUNK
from charlm.storage.model_file import load_model
from charlm.storage.run import find_model
from charlm.text.corpus import Corpus


def every_20th_letter(text):
    letters = [place for place, char in enumerate(text) if char.isalpha()]
    return [place for place in letters[19::20] if 2 <= place < len(text) - 2]


def by_network(loaded, ids, places):
    """Return the most probable characters at `places`, in windows of the text that overlap by half."""
    guesses = {}
    for start in range(0, len(ids), CHUNK // 2):
        window = ids[start : start + CHUNK].long()[None]
        with torch.inference_mode():
            logits, _ = loaded.model(window, loaded.model.initial_state(1))
        # A place near the edge of a window is guessed again by the next window.
        edge = CHUNK // 4 if start else 0
        for place in places:
            if start + edge <= place < start + window.shape[1]:
                guesses[place] = loaded.vocab.characters[int(logits[0, place - start].argmax())]
    return [guesses[place] for place in places]


def by_trigrams(train, text, places):
    trigrams, letters = Counter(zip(train, train[1:], train[2:], strict=False)), sorted(set(train))

    def best(a, b, d, e):
        return max(
            letters, key=lambda c: (trigrams[a, b, c] + 1) * (trigrams[b, c, d] + 1) * (trigrams[c, d, e] + 1)
        )

    return [best(*text[place - 2 : place], *text[place + 1 : place + 3]) for place in places]


def by_trigrams_left(train, text, places):
    following = {}
    for a, b, c in zip(train, train[1:], train[2:], strict=False):
        following.setdefault((a, b), Counter())[c] += 1
    return [
        max(following.get((text[p - 2], text[p - 1]), {" ": 1}).items(), key=lambda item: item[1])[0]
        for p in places
    ]


def main():
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--corpus", help="the training text of the model; its last 5%% are filled in")
    arguments.add_argument("--model", help="the run or the model file; the newest by default")
    options = arguments.parse_args()
    if not options.corpus:
        print("needs --corpus quijote.txt and a model trained on it with fill.yaml; nothing measured")
        return
    loaded = load_model(Path(find_model(options.model)))
    config = CorpusConfig(**{**loaded.config.corpus.model_dump(), "source": options.corpus})
    corpus = Corpus.load(config)
    train, text = (loaded.vocab.decode(ids) for ids in (corpus.train, corpus.test))
    places = every_20th_letter(text)
    print(f"{len(places):,} blanks, every 20th letter of the last {len(text):,} characters\n")
    print("| filled in by | restored |\n|---|---|")
    for name, guesses in {
        "charlm": by_network(loaded, corpus.test, places),
        "trigrams, left and right": by_trigrams(train, text, places),
        "trigrams, from the left": by_trigrams_left(train, text, places),
    }.items():
        right = sum(text[place] == guess for place, guess in zip(places, guesses, strict=True))
        print(f"| {name} | {right / len(places):.1%} |")


if __name__ == "__main__":
    main()
