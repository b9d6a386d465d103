#!/usr/bin/python3
"""Reads a GGUF file of ember's kind and runs it in numpy, float32.

Shares no code with the training or the writer: what it generates shows that the file holds all that is
needed. Many sequences run side by side, with a key and value cache.

  reference.py FILE [PROMPT] [--temperature T] [--seed N] [--count N] [--defaults]
  reference.py FILE --loss N     loss over N held-out stories
"""
import argparse
import struct

import numpy as np

SPACE = "\u2581"


class File:
    def __init__(self, path):
        with open(path, "rb") as f:
            self.raw = f.read()
        self.at = 0
        assert self.take(4) == b"GGUF" and self.number("I") == 3
        n_tensors, n_meta = self.number("Q"), self.number("Q")
        self.meta = {}
        for _ in range(n_meta):
            key = self.text()
            self.meta[key] = self.value(self.number("I"))
        infos = [(self.text(), [self.number("Q") for _ in range(self.number("I"))], self.number("I"),
                  self.number("Q")) for _ in range(n_tensors)]
        align = self.meta.get("general.alignment", 32)
        base = (self.at + align - 1) // align * align
        self.tensors = {}
        for name, dims, kind, offset in infos:
            form = {0: "<f4", 1: "<f2"}[kind]
            assert offset % align == 0
            flat = np.frombuffer(self.raw, form, int(np.prod(dims)), base + offset)
            self.tensors[name] = flat.reshape(dims[::-1]).astype(np.float32)

    def take(self, n):
        self.at += n
        return self.raw[self.at - n:self.at]

    def number(self, form):
        return struct.unpack("<" + form, self.take(struct.calcsize(form)))[0]

    def text(self):
        return self.take(self.number("Q")).decode()

    def value(self, kind):
        if kind == 8:
            return self.text()
        if kind == 9:
            inner, n = self.number("I"), self.number("Q")
            return [self.value(inner) for _ in range(n)]
        if kind == 7:
            return self.number("B") != 0
        return self.number({0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q",
                            12: "d"}[kind])


class Model:
    def __init__(self, path):
        f = File(path)
        m, self.w = f.meta, f.tensors
        assert m["general.architecture"] == "llama" and m["tokenizer.ggml.model"] == "llama"
        self.context, self.layers = m["llama.context_length"], m["llama.block_count"]
        self.heads, self.kv_heads = m["llama.attention.head_count"], m["llama.attention.head_count_kv"]
        self.eps = m["llama.attention.layer_norm_rms_epsilon"]
        self.head = m["llama.embedding_length"] // self.heads
        assert m["llama.rope.dimension_count"] == self.head
        angle = np.arange(self.context)[:, None] * m["llama.rope.freq_base"] ** (
            -np.arange(0, self.head, 2) / self.head)
        self.cos, self.sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        self.tokens, self.types = m["tokenizer.ggml.tokens"], m["tokenizer.ggml.token_type"]
        self.scores = m["tokenizer.ggml.scores"]
        self.bos, self.eos = m["tokenizer.ggml.bos_token_id"], m["tokenizer.ggml.eos_token_id"]
        self.prefix = m.get("tokenizer.ggml.add_space_prefix", True)
        self.ids = {t: i for i, t in enumerate(self.tokens) if self.types[i] == 1}
        self.bytes = {t: i for i, t in enumerate(self.tokens) if self.types[i] == 6}

    def encode(self, text):
        """Joins the adjacent pair of highest score until none is left; no BOS."""
        if text and self.prefix:
            text = " " + text
        parts = list(text.replace(" ", SPACE))
        while True:
            joined = [(self.scores[self.ids[a + b]], -i) for i, (a, b) in enumerate(zip(parts, parts[1:]))
                      if a + b in self.ids]
            if not joined:
                break
            i = -max(joined)[1]
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        out = []
        for part in parts:
            out += [self.ids[part]] if part in self.ids else [self.bytes[f"<0x{b:02X}>"]
                                                             for b in part.encode()]
        return out

    def decode(self, ids, first=True):
        raw = b""
        for i in ids:
            if self.types[i] == 6:
                raw += bytes([int(self.tokens[i][3:5], 16)])
            elif self.types[i] == 1:
                raw += self.tokens[i].replace(SPACE, " ").encode()
        text = raw.decode("utf-8", "replace")
        return text[1:] if first and text.startswith(" ") else text

    def norm(self, x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * self.w[name]

    def rotate(self, x, at):
        cos, sin = self.cos[at][:, None], self.sin[at][:, None]  # rows: tokens of the step
        out = np.empty_like(x)
        out[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
        out[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos
        return out

    def start(self, sequences):
        shape = (self.layers, sequences, self.kv_heads, self.context, self.head)
        return np.zeros(shape, np.float32), np.zeros(shape, np.float32)

    def step(self, cache, ids, at):
        """One token for each sequence, all at position `at`; returns logits, a row a sequence."""
        keys, values = cache
        n = len(ids)
        where = np.full(n, at)
        x = self.w["token_embd.weight"][ids]
        for layer in range(self.layers):
            def w(name):
                return self.w[f"blk.{layer}.{name}.weight"]
            h = self.norm(x, f"blk.{layer}.attn_norm.weight")
            q = self.rotate((h @ w("attn_q").T).reshape(n, self.heads, self.head), where)
            k = self.rotate((h @ w("attn_k").T).reshape(n, self.kv_heads, self.head), where)
            keys[layer, :, :, at] = k
            values[layer, :, :, at] = (h @ w("attn_v").T).reshape(n, self.kv_heads, self.head)
            q = q.reshape(n, self.kv_heads, self.heads // self.kv_heads, self.head)
            score = q @ keys[layer, :, :, :at + 1].transpose(0, 1, 3, 2) / np.sqrt(np.float32(self.head))
            score = np.exp(score - score.max(-1, keepdims=True))
            score /= score.sum(-1, keepdims=True)
            h = (score @ values[layer, :, :, :at + 1]).reshape(n, -1)
            x = x + h @ w("attn_output").T
            h = self.norm(x, f"blk.{layer}.ffn_norm.weight")
            gate = h @ w("ffn_gate").T
            x = x + (gate / (1 + np.exp(-gate)) * (h @ w("ffn_up").T)) @ w("ffn_down").T
        return self.norm(x, "output_norm.weight") @ self.w["token_embd.weight"].T

    def generate(self, prompt="", count=1, temperature=0.8, seed=1, top_k=0, top_p=1.0, min_p=0.0,
                 max_tokens=256):
        """Returns (text, reason) for each; reason is stop, length or context."""
        rng = np.random.default_rng(seed)
        start = [self.bos] + self.encode(prompt)
        cache = self.start(count)
        for at, one in enumerate(start):
            logits = self.step(cache, np.full(count, one), at)
        out, reason = [[] for _ in range(count)], [None] * count
        at = len(start)
        while True:
            chosen = [pick(row, rng, temperature, top_k, top_p, min_p) for row in logits]
            for i, one in enumerate(chosen):
                if reason[i] is None:
                    if one == self.eos:
                        reason[i] = "stop"
                    else:
                        out[i].append(one)
                        if len(out[i]) >= max_tokens:
                            reason[i] = "length"
                        elif at >= self.context:
                            reason[i] = "context"
            if all(reason):
                return [(self.decode(ids, first=not prompt), r) for ids, r in zip(out, reason)]
            logits = self.step(cache, np.array(chosen), at)
            at += 1


def pick(logits, rng, temperature, top_k, top_p, min_p):
    if temperature <= 0:
        return int(np.argmax(logits))
    p = np.exp((logits - logits.max()).astype(np.float64) / temperature)
    order = np.argsort(-p, kind="stable")
    p = p[order]
    if top_k:
        p[top_k:] = 0
    p /= p.sum()
    keep = np.cumsum(p) - p < top_p
    keep &= p >= min_p * p[0]
    p = p * keep
    return int(order[rng.choice(len(p), p=p / p.sum())])


DEFAULTS = {"top_k": 40, "top_p": 0.95, "min_p": 0.05}  # hearth's own


def held_out_loss(model, count):
    """As train.py counts it: every token of a story but its prompt, EOS included."""
    import grammar
    total, tokens = 0.0, 0
    for index in range(0, count * grammar.HELD_OUT_EVERY, grammar.HELD_OUT_EVERY):
        prompt, text, facts = grammar.story(index)
        ids = [model.bos] + model.encode(prompt + text) + [model.eos]
        free = 1 + len(model.encode(prompt + text[:facts["given"]]))
        cache = model.start(1)
        for at in range(len(ids) - 1):
            row = model.step(cache, np.array([ids[at]]), at)[0].astype(np.float64)
            if at + 1 >= free:
                total += np.log(np.exp(row - row.max()).sum()) + row.max() - row[ids[at + 1]]
                tokens += 1
    return total / tokens


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("file")
    parser.add_argument("prompt", nargs="?", default="")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--defaults", action="store_true", help="hearth's top-k, top-p and min-p")
    parser.add_argument("--loss", type=int)
    args = parser.parse_args()
    model = Model(args.file)
    if args.loss:
        print(f"{held_out_loss(model, args.loss):.4f}")
        return
    for text, reason in model.generate(args.prompt, args.count, args.temperature, args.seed,
                                       **(DEFAULTS if args.defaults else {})):
        print(f"{args.prompt}{text} [{reason}]")


if __name__ == "__main__":
    main()
