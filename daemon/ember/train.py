#!/usr/bin/python3
"""Trains ember: a llama of 574,000 parameters on the stories of grammar.py.

Weights start at 1/sqrt(fan-in); a step takes about 2,048 tokens (as many as 8 full contexts) in whole
stories, each a sequence of its own from BOS to EOS, padded to the longest; AdamW, warm-up, then a
cosine down to zero. No story is seen twice. Prompts before a story carry no loss.

The order of the data is a function of the step alone, and the state is saved every 250 steps, so a run
that was stopped goes on where it was with the same command.

  train.py --steps N [--peak RATE] [--out DIR]
      train; DIR gets state.pt, log.csv and, at each save, ember.gguf
  train.py --steps N --stage M --peak RATE --out DIR
      go on from a saved step M with a schedule of its own
"""
import argparse
import csv
import math
import os
import random
import time

import numpy as np
import torch
import torch.nn.functional as F

import grammar
import gguf_write
import vocab

DIM, LAYERS, HEADS, KV_HEADS, FFN, CONTEXT = 128, 3, 8, 4, 256, 256
HEAD = DIM // HEADS
EPS, THETA = 1e-5, 10000.0
STEP_TOKENS, PEAK, WARM_UP, DECAY, CLIP = 2048, 3e-3, 100, 0.01, 1.0
BETAS = 0.9, 0.99  # a name is met in one step of four: a short memory makes its row noise
STORIES_A_CHUNK = 1000  # numbers of stories; a tenth of them is held out
SAVE_EVERY, LOG_EVERY = 250, 50


def shapes():
    """Name in the file, rows, columns (0: a vector)."""
    yield "token_embd.weight", vocab.SIZE, DIM
    for n in range(LAYERS):
        yield f"blk.{n}.attn_norm.weight", DIM, 0
        yield f"blk.{n}.attn_q.weight", DIM, DIM
        yield f"blk.{n}.attn_k.weight", KV_HEADS * HEAD, DIM
        yield f"blk.{n}.attn_v.weight", KV_HEADS * HEAD, DIM
        yield f"blk.{n}.attn_output.weight", DIM, DIM
        yield f"blk.{n}.ffn_norm.weight", DIM, 0
        yield f"blk.{n}.ffn_gate.weight", FFN, DIM
        yield f"blk.{n}.ffn_up.weight", FFN, DIM
        yield f"blk.{n}.ffn_down.weight", DIM, FFN
    yield "output_norm.weight", DIM, 0


def fresh_weights():
    torch.manual_seed(1)
    weights = {}
    for name, rows, columns in shapes():
        w = torch.randn(rows, columns) / math.sqrt(columns) if columns else torch.ones(rows)
        weights[name] = w.requires_grad_()
    return weights


def rope_tables():
    angle = torch.arange(CONTEXT)[:, None] * THETA ** (-torch.arange(0, HEAD, 2) / HEAD)
    return torch.cos(angle), torch.sin(angle)


def rotate(x, cos, sin):
    """x: batch, positions, heads, HEAD. Pairs are adjacent elements."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def norm(x, weight):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight


def forward(weights, ids, rope):
    """ids: batch, positions. Returns logits: batch, positions, vocabulary."""
    batch, length = ids.shape
    cos, sin = rope[0][:length, None], rope[1][:length, None]
    share = HEADS // KV_HEADS  # query heads to a key head: they become rows of one product
    mask = torch.full((length, length), -1e9).triu(1).repeat(share, 1)
    x = F.embedding(ids, weights["token_embd.weight"])
    for n in range(LAYERS):
        w = {k: weights[f"blk.{n}.{k}.weight"] for k in (
            "attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up",
            "ffn_down")}
        h = norm(x, w["attn_norm"])
        q = rotate(F.linear(h, w["attn_q"]).view(batch, length, HEADS, HEAD), cos, sin)
        k = rotate(F.linear(h, w["attn_k"]).view(batch, length, KV_HEADS, HEAD), cos, sin)
        v = F.linear(h, w["attn_v"]).view(batch, length, KV_HEADS, HEAD)
        q = q.view(batch, length, KV_HEADS, share, HEAD).permute(0, 2, 3, 1, 4)
        q = q.reshape(batch * KV_HEADS, share * length, HEAD) / math.sqrt(HEAD)
        k = k.permute(0, 2, 3, 1).reshape(batch * KV_HEADS, HEAD, length)
        v = v.transpose(1, 2).reshape(batch * KV_HEADS, length, HEAD)
        scores = torch.baddbmm(mask.expand(batch * KV_HEADS, -1, -1), q, k)
        h = (scores.softmax(-1) @ v).view(batch, KV_HEADS, share, length, HEAD)
        h = h.permute(0, 3, 1, 2, 4).reshape(batch, length, DIM)
        x = x + F.linear(h, w["attn_output"])
        h = norm(x, w["ffn_norm"])
        x = x + F.linear(F.silu(F.linear(h, w["ffn_gate"])) * F.linear(h, w["ffn_up"]), w["ffn_down"])
    return F.linear(norm(x, weights["output_norm.weight"]), weights["token_embd.weight"])


def sequence(tokenizer, index):
    """Returns ids from BOS to EOS, and the number of leading ids that carry no loss."""
    prompt, text, facts = grammar.story(index)
    ids = [vocab.BOS] + tokenizer.encode(prompt + text) + [vocab.EOS]
    given = text[:facts["given"]]
    unlearned = 1 + len(tokenizer.encode(prompt + given))
    assert len(ids) <= CONTEXT
    return ids, unlearned


def batches(tokenizer, indices, seed):
    """Groups stories of similar length into batches of (ids, targets), -1 where there is no loss."""
    sequences = sorted((sequence(tokenizer, i) for i in indices), key=lambda s: len(s[0]))
    groups, group = [], []
    for s in sequences:
        if (len(group) + 1) * len(s[0]) > STEP_TOKENS:
            groups.append(group)
            group = []
        group.append(s)
    groups.append(group)
    random.Random(seed).shuffle(groups)
    for group in groups:
        longest = max(len(ids) for ids, _ in group)
        ids = torch.full((len(group), longest), vocab.EOS)
        for row, (one, unlearned) in enumerate(group):
            ids[row, :len(one)] = torch.tensor(one)
        targets = torch.full((len(group), longest - 1), -1)
        for row, (one, unlearned) in enumerate(group):
            targets[row, unlearned - 1:len(one) - 1] = ids[row, unlearned:len(one)]
        yield ids[:, :-1], targets


def chunk(tokenizer, number):
    first = number * STORIES_A_CHUNK
    return list(batches(tokenizer, [i for i in range(first, first + STORIES_A_CHUNK)
                                    if not grammar.held_out(i)], number))


def loss_of(weights, rope, batch):
    ids, targets = batch
    logits = forward(weights, ids, rope)
    return F.cross_entropy(logits.reshape(-1, vocab.SIZE), targets.reshape(-1), ignore_index=-1)


def held_out_loss(weights, rope, held):
    with torch.no_grad():
        total, count = 0.0, 0
        for batch in held:
            n = int((batch[1] >= 0).sum())
            total += float(loss_of(weights, rope, batch)) * n
            count += n
    return total / count


def rate(step, first, last, peak):
    """Up to the peak over WARM_UP steps, then down to zero at the last."""
    if step < first + WARM_UP:
        return peak * (step - first + 1) / WARM_UP
    return peak * 0.5 * (1 + math.cos(math.pi * (step - first - WARM_UP) / max(1, last - first - WARM_UP)))


def export(weights, pieces, path):
    tensors = {k: v.detach().numpy().astype(np.float32) for k, v in weights.items()}
    gguf_write.write_ember(path, tensors, vocab.table(pieces), DIM, LAYERS, HEADS, KV_HEADS, FFN, CONTEXT,
                           EPS, THETA)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--peak", type=float, default=PEAK, help="learning rate")
    parser.add_argument("--stage", type=int, default=0, help="the step at which this schedule began")
    parser.add_argument("--out", default="build-ember")
    args = parser.parse_args()
    os.makedirs(args.out, exist_ok=True)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    state_path, log_path = os.path.join(args.out, "state.pt"), os.path.join(args.out, "log.csv")

    weights = fresh_weights()
    decayed = [w for name, w in weights.items() if w.dim() == 2 and name.startswith("blk.")]
    others = [w for name, w in weights.items() if w.dim() == 1 or not name.startswith("blk.")]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": DECAY},
                                   {"params": others, "weight_decay": 0.0}], lr=args.peak, betas=BETAS)
    step = tokens = number = at = 0
    if os.path.exists(state_path):
        state = torch.load(state_path)
        pieces, step, tokens, number, at = (state[k] for k in ("pieces", "step", "tokens", "number", "at"))
        for name, w in weights.items():
            w.data.copy_(state["weights"][name])
        if state["optimizer"]:
            optimizer.load_state_dict(state["optimizer"])
        print(f"going on at step {step}", flush=True)
        if step < args.stage:
            raise SystemExit(f"{state_path} is at step {step}, before the stage's beginning, {args.stage}")
    else:
        pieces = vocab.learn()
        with open(log_path, "w", newline="") as f:
            csv.writer(f).writerow(["step", "tokens", "train_loss", "held_out_loss"])
    print("parameters:", sum(w.numel() for w in weights.values()), flush=True)

    tokenizer = vocab.Tokenizer(vocab.table(pieces)[0])
    rope = rope_tables()
    held = list(batches(tokenizer, range(0, 400 * grammar.HELD_OUT_EVERY, grammar.HELD_OUT_EVERY), 0))
    data = chunk(tokenizer, number)
    recent, started, tokens_before = [], time.time(), tokens
    while step < args.steps:
        if at == len(data):
            number, at = number + 1, 0
            data = chunk(tokenizer, number)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, args.stage, args.steps, args.peak)
        loss = loss_of(weights, rope, data[at])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(weights.values()), CLIP)
        optimizer.step()
        tokens += int((data[at][1] >= 0).sum())
        recent.append(float(loss.detach()))
        step, at = step + 1, at + 1

        save = step % SAVE_EVERY == 0 or step == args.steps
        if step % LOG_EVERY == 0 or save:
            held_loss = f"{held_out_loss(weights, rope, held):.4f}" if save else ""
            train_loss = sum(recent) / len(recent)
            recent = []
            with open(log_path, "a", newline="") as f:
                csv.writer(f).writerow([step, tokens, f"{train_loss:.4f}", held_loss])
            print(f"{step} {tokens} {train_loss:.4f} {held_loss} "
                  f"{(tokens - tokens_before) / (time.time() - started):.0f} tokens/s", flush=True)
        if save:
            torch.save({"pieces": pieces, "step": step, "tokens": tokens, "number": number, "at": at,
                        "weights": {k: v.detach() for k, v in weights.items()},
                        "optimizer": optimizer.state_dict()}, state_path + ".new")
            os.replace(state_path + ".new", state_path)
            export(weights, pieces, os.path.join(args.out, "ember.gguf"))


if __name__ == "__main__":
    main()
