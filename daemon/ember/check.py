#!/usr/bin/python3
"""Says whether ember's stories hold together, and whether they are its own.

  check.py [--file ember.gguf] [--count 200] [--temperature 0.8] [--seed 1] [--defaults]
      samples with reference.py, from BOS alone (--prompt TEXT: from that)
  check.py --stdin [--prompt TEXT]
      judges samples on stdin instead: lines of text, or JSON objects as `hearth run --json` prints them
      (`text`, `reason`, perhaps `prompt`); a plain line has ended by itself if it ends as a sentence does

A sample is kept when it ended by itself, speaks of exactly one name, one animal and one thing from
beginning to end, and speaks of all three in its last two sentences ("The end." and its like not
counted). A capitalised word that no training story has counts as a name. A sample is copied when its text
stands word for word among the training stories, which are generated again for this.

Exit 0: at least 95 % are kept and at least 90 % are not copied. -v prints every sample that fails.
"""
import argparse
import json
import os
import re
import sys

import grammar

TRAINED = 200000  # numbers of stories; training takes fewer
KEPT, OWN = 0.95, 0.90
WORD = re.compile(r"[A-Za-z]+")
NAMES = set(grammar.GIRLS + grammar.BOYS)
ANIMALS = set(grammar.ANIMALS + grammar.RARE_ANIMALS)
THINGS = set(grammar.THINGS)
CLOSING = re.compile(r" (The end\.|And that was the best day of the year( for all of them)?\.)$")
SENTENCE = re.compile(r"(?<=[.!?]) (?=[A-Z\"])|(?<=[.!?]\") (?=[A-Z\"])")


def words_known():
    """Every word that a training story uses, names that were made up for one story excepted."""
    words = set()
    for index in range(20000):
        _, text, facts = grammar.story(index)
        if not facts["invented"]:
            words.update(WORD.findall(text))
    for ask in grammar.ASK:
        words.update(WORD.findall(ask))
    return words


def judge(text, ended, known):
    """Returns a list of complaints; none means the sample is kept."""
    wrong = [] if ended else ["did not end by itself"]
    text = " ".join(text.split())
    sentences = SENTENCE.split(CLOSING.sub("", text))
    last = set(WORD.findall(" ".join(sentences[-2:])))
    every = WORD.findall(text)
    for what, found in (
            ("name", {w for w in every if w in NAMES or (w[0].isupper() and w not in known)}),
            ("animal", {w for w in every if w in ANIMALS}),
            ("thing", {w for w in every if w in THINGS})):
        if not found:
            wrong.append(f"has no {what}")
        elif len(found) > 1:
            wrong.append(f"changes its {what} ({', '.join(sorted(found))})")
        elif not found <= last:
            wrong.append(f"loses its {what} before the end")
    return wrong


def plain(text):
    """A story with its name, animal and thing blanked, so that a copy which only changed them shows."""
    return WORD.sub(lambda m: "N" if m[0] in NAMES else "A" if m[0] in ANIMALS else
                    "T" if m[0] in THINGS else m[0], text)


def read_stdin(prompt):
    for line in sys.stdin:
        line = line.strip()
        if not line:
            continue
        if line.startswith("{"):
            one = json.loads(line)
            text = one.get("prompt", prompt) + one["text"]
            yield text, one["reason"] == "stop"
        else:
            yield prompt + line, re.search(r"[.!?]\"?$", line) is not None


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    parser = argparse.ArgumentParser()
    parser.add_argument("--stdin", action="store_true")
    parser.add_argument("--file", default=os.path.join(here, "ember.gguf"))
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--prompt", default="")
    parser.add_argument("--defaults", action="store_true", help="hearth's top-k, top-p and min-p")
    parser.add_argument("--no-copies", action="store_true", help="leave out the comparison with training")
    parser.add_argument("-v", action="store_true")
    args = parser.parse_args()
    if args.stdin:
        samples = list(read_stdin(args.prompt))
    else:
        import reference
        options = reference.DEFAULTS if args.defaults else {}
        samples = [(args.prompt + text, reason == "stop") for text, reason in reference.Model(
            args.file).generate(args.prompt, args.count, args.temperature, args.seed, **options)]
    if not samples:
        sys.exit("no samples")

    known = words_known()
    kept, ended, strange, complaints = 0, 0, 0, {}
    for text, by_itself in samples:
        wrong = judge(text, by_itself, known)
        kept += not wrong
        ended += by_itself
        strange += any(w not in known and w[0].islower() for w in WORD.findall(text))
        for one in wrong:
            kind = one.split(" (")[0]
            complaints[kind] = complaints.get(kind, 0) + 1
        if wrong and args.v:
            print("; ".join(wrong) + ":", text.replace("\n", "\\n"))
    n = len(samples)
    print(f"samples {n}")
    print(f"name, animal and thing kept to the end, and ended by itself: {kept} ({100 * kept / n:.1f} %)")
    print(f"ended by itself: {ended}; with a word no training story has: {strange}")
    for kind in sorted(complaints):
        print(f"  {kind}: {complaints[kind]}")
    good = kept >= KEPT * n
    if not args.no_copies:
        mine = {text.split("\n", 1)[-1].strip() for text, _ in samples}
        blanked = {plain(text) for text in mine}
        copied, alike = set(), set()
        for index in range(TRAINED):
            if grammar.held_out(index):
                continue
            text = grammar.story(index)[1].strip()
            if text in mine:
                copied.add(text)
            shape = plain(text)
            if shape in blanked:
                alike.add(shape)
        copies = sum(text.split("\n", 1)[-1].strip() in copied for text, _ in samples)
        shapes = sum(plain(text.split("\n", 1)[-1].strip()) in alike for text, _ in samples)
        print(f"word for word in the training text: {copies} ({100 * copies / n:.1f} %)")
        print(f"the same but for name, animal and thing: {shapes} ({100 * shapes / n:.1f} %)")
        good = good and n - copies >= OWN * n
    print("passed" if good else "failed")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
