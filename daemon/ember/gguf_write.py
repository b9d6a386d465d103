"""Writes ember's GGUF v3 file: little-endian, metadata, tensor infos, then tensors aligned to 32 bytes.

Matrices are stored as F16, vectors as F32. Dimensions in the file run innermost first.
"""
import struct

import numpy as np

U32, F32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9
I32 = 5
TENSOR_F32, TENSOR_F16 = 0, 1
ALIGNMENT = 32


def _string(text):
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


_SCALAR = {U32: lambda v: struct.pack("<I", v), I32: lambda v: struct.pack("<i", v),
           F32: lambda v: struct.pack("<f", v), BOOL: lambda v: struct.pack("<B", v), STRING: _string}


def _entry(key, kind, value):
    head = _string(key)
    if isinstance(value, (list, tuple)):
        body = b"".join(_SCALAR[kind](v) for v in value)
        return head + struct.pack("<IIQ", ARRAY, kind, len(value)) + body
    return head + struct.pack("<I", kind) + _SCALAR[kind](value)


def write(path, metadata, tensors):
    """metadata: (key, kind, value) in order; a list is an array of that kind. tensors: name → array."""
    infos, blobs, offset = [], [], 0
    for name, array in tensors.items():
        half = array.ndim > 1
        raw = np.ascontiguousarray(array, "<f2" if half else "<f4").tobytes()
        infos.append(_string(name) + struct.pack("<I", array.ndim) +
                     struct.pack(f"<{array.ndim}Q", *reversed(array.shape)) +
                     struct.pack("<IQ", TENSOR_F16 if half else TENSOR_F32, offset))
        padded = raw + bytes(-len(raw) % ALIGNMENT)
        blobs.append(padded)
        offset += len(padded)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(_entry(*m) for m in metadata) + b"".join(infos)
    with open(path, "wb") as f:
        f.write(head + bytes(-len(head) % ALIGNMENT) + b"".join(blobs))


def write_ember(path, tensors, vocabulary, dim, layers, heads, kv_heads, ffn, context, eps, theta):
    tokens, scores, types = vocabulary
    write(path, [
        ("general.architecture", STRING, "llama"),
        ("general.name", STRING, "ember"),
        ("general.description", STRING, "A tiny story model, trained on text generated from a grammar"),
        ("general.license", STRING, "MIT"),
        ("general.file_type", U32, 1),
        ("general.alignment", U32, ALIGNMENT),
        ("llama.context_length", U32, context),
        ("llama.embedding_length", U32, dim),
        ("llama.block_count", U32, layers),
        ("llama.feed_forward_length", U32, ffn),
        ("llama.attention.head_count", U32, heads),
        ("llama.attention.head_count_kv", U32, kv_heads),
        ("llama.attention.layer_norm_rms_epsilon", F32, eps),
        ("llama.rope.dimension_count", U32, dim // heads),
        ("llama.rope.freq_base", F32, theta),
        ("llama.vocab_size", U32, len(tokens)),
        ("tokenizer.ggml.model", STRING, "llama"),
        ("tokenizer.ggml.tokens", STRING, tokens),
        ("tokenizer.ggml.scores", F32, scores),
        ("tokenizer.ggml.token_type", I32, types),
        ("tokenizer.ggml.bos_token_id", U32, 1),
        ("tokenizer.ggml.eos_token_id", U32, 2),
        ("tokenizer.ggml.unknown_token_id", U32, 0),
        ("tokenizer.ggml.add_bos_token", BOOL, True),
        ("tokenizer.ggml.add_eos_token", BOOL, False),
        ("tokenizer.ggml.add_space_prefix", BOOL, True),
    ], tensors)
