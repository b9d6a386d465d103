#!/usr/bin/python3
"""ember's vocabulary and its tokenizer, which is the one the daemon applies to `llama` files.

1,024 pieces: 0 <unk>, 1 <s>, 2 </s>, 3..258 the bytes <0x00>..<0xFF>, then 765 pieces in order of
learning, single characters last. A space is written U+2581, text begins with one (add_space_prefix).
The score of a piece is minus its rank, so the earliest learned pair merges first.

Encoding starts from single characters and joins, as long as there is one, the adjacent pair whose
joined text is the piece of highest score (the leftmost of equals); characters without a piece become
bytes. Learning counts pairs by their joined text and merges by the same rule, therefore encoding
repeats the learning and reaches every piece; `learn` asserts it.

  vocab.py               learn, and print what came out
"""
import re
from collections import Counter

import grammar

SIZE = 1024
SPACE = "\u2581"
UNK, BOS, EOS, FIRST_BYTE, FIRST_PIECE = 0, 1, 2, 3, 259
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,!?\"'-:" + SPACE
LEARN_FROM = 12000  # stories

# No learned piece spans two of these chunks, so each can be encoded by itself and remembered.
CHUNK = re.compile(SPACE + r"*[A-Za-z]+|" + SPACE + r"*[^A-Za-z" + SPACE + r"\n]+|" + SPACE + r"+|\n+")


def _merge(symbols, piece):
    merged, i = [], 0
    while i < len(symbols):
        if i + 1 < len(symbols) and symbols[i] + symbols[i + 1] == piece:
            merged.append(piece)
            i += 2
        else:
            merged.append(symbols[i])
            i += 1
    return merged


def learn():
    """Returns the 765 learned pieces in order: merged ones by rank, then the single characters."""
    counts = Counter()
    for index in range(LEARN_FROM):
        if grammar.held_out(index):
            continue
        prompt, text, facts = grammar.story(index)
        if facts["invented"]:
            continue
        if not any(prompt.startswith(ask.split("{")[0]) for ask in grammar.ASK):
            prompt = ""
        counts.update(CHUNK.findall(SPACE + (prompt + text).replace(" ", SPACE)))
    words = [(list(word), n) for word, n in sorted(counts.items()) if "\n" not in word]
    pieces = []
    while len(pieces) < SIZE - FIRST_PIECE - len(ALPHABET):
        pairs = Counter()
        for symbols, n in words:
            for left, right in zip(symbols, symbols[1:]):
                pairs[left + right] += n
        piece = max(pairs, key=lambda p: (pairs[p], p))
        pieces.append(piece)
        words = [(_merge(symbols, piece), n) if piece in "".join(symbols) else (symbols, n)
                 for symbols, n in words]
    pieces += list(ALPHABET)
    tokenizer = Tokenizer(table(pieces)[0])
    for i, piece in enumerate(pieces):
        assert tokenizer.encode_raw(piece) == [FIRST_PIECE + i], piece
    return pieces


def table(pieces):
    """Returns tokens, scores and types as they stand in the file."""
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)] + list(pieces)
    scores = [0.0] * FIRST_PIECE + [-float(rank) for rank in range(len(pieces))]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(pieces)
    assert len(tokens) == len(set(tokens)) == SIZE
    return tokens, scores, types


class Tokenizer:
    """Encodes and decodes with a file's tokens (the layout above)."""

    def __init__(self, tokens):
        self.tokens = tokens
        self.ids = {token: i for i, token in enumerate(tokens) if i >= FIRST_PIECE}
        self._known = {}

    def encode_raw(self, text):
        """The greedy algorithm itself, over text whose spaces are already U+2581."""
        symbols = list(text)
        while True:
            best, at = SIZE, -1
            for i in range(len(symbols) - 1):
                rank = self.ids.get(symbols[i] + symbols[i + 1], SIZE)
                if rank < best:
                    best, at = rank, i
            if at < 0:
                break
            symbols[at:at + 2] = [symbols[at] + symbols[at + 1]]
        ids = []
        for symbol in symbols:
            if symbol in self.ids:
                ids.append(self.ids[symbol])
            else:
                ids += [FIRST_BYTE + byte for byte in symbol.encode()]
        return ids

    def encode(self, text):
        """Ids of a text, without BOS."""
        ids = []
        for chunk in CHUNK.findall(SPACE + text.replace(" ", SPACE)) if text else []:
            if chunk not in self._known:
                self._known[chunk] = self.encode_raw(chunk)
            ids += self._known[chunk]
        return ids

    def decode(self, ids):
        """Text of ids; the first space is the prefix and goes."""
        raw = b""
        for i in ids:
            if FIRST_BYTE <= i < FIRST_PIECE:
                raw += bytes([i - FIRST_BYTE])
            elif i >= FIRST_PIECE:
                raw += self.tokens[i].replace(SPACE, " ").encode()
        text = raw.decode("utf-8", "replace")
        return text[1:] if text.startswith(" ") else text


if __name__ == "__main__":
    learned = learn()
    tok = Tokenizer(table(learned)[0])
    lengths = []
    for n in range(0, 20000, 10):
        asked, told, _ = grammar.story(n)
        whole = asked + told
        line = tok.encode(whole)
        assert tok.decode(line) == whole
        if n < 1000:
            assert tok.encode_raw(SPACE + whole.replace(" ", SPACE)) == line
        lengths.append(len(line) + 2)
    lengths.sort()
    print(" ".join(learned))
    print("tokens a story: least {}, median {}, most {}".format(
        lengths[0], lengths[len(lengths) // 2], lengths[-1]))
