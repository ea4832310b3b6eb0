#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make a GGUF file to try the example on: a small random model, or a quantised model in float32.

    make_gguf.py random tiny.gguf             Llama blocks, a tokenizer of single bytes; a few hundred kB
    make_gguf.py dequantise q4.gguf f32.gguf  the same values without the quantised kernels

llama.cpp rounds activations to 8 bits wherever it multiplies them with quantised weights, and other programs do
not: on the dequantised file the two agree to float32 rounding. Needs the Python packages gguf and numpy.
"""

import argparse

import gguf
import numpy


def byte_tokens():
    """The printable stand-ins that GPT-2's tokenizer has for the 256 bytes."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    names = {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}
    return [names[b] for b in range(256)]


def random_model(path, blocks, width, heads, seed):
    random = numpy.random.default_rng(seed)
    tokens = byte_tokens() + ["th", "<end>"]
    inner, kv_heads = 2 * width, heads // 2
    out = gguf.GGUFWriter(path, "llama")
    out.add_name("random")
    out.add_block_count(blocks)
    out.add_context_length(4096)
    out.add_embedding_length(width)
    out.add_feed_forward_length(inner)
    out.add_head_count(heads)
    out.add_head_count_kv(kv_heads)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_dimension_count(width // heads)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("gpt-2")
    out.add_token_list(tokens)
    out.add_token_types([gguf.TokenType.NORMAL] * 257 + [gguf.TokenType.CONTROL])
    out.add_token_merges(["t h"])
    out.add_bos_token_id(257)
    out.add_eos_token_id(257)
    out.add_add_bos_token(False)

    def weight(name, *shape):
        values = random.normal(0.0, 0.5 / numpy.sqrt(shape[-1]), shape)
        out.add_tensor(name + ".weight", values.astype(numpy.float32))

    def norm(name):
        out.add_tensor(name + ".weight", numpy.ones(width, numpy.float32))

    weight("token_embd", len(tokens), width)
    for i in range(blocks):
        norm(f"blk.{i}.attn_norm")
        norm(f"blk.{i}.ffn_norm")
        weight(f"blk.{i}.attn_q", width, width)
        weight(f"blk.{i}.attn_k", width * kv_heads // heads, width)
        weight(f"blk.{i}.attn_v", width * kv_heads // heads, width)
        weight(f"blk.{i}.attn_output", width, width)
        weight(f"blk.{i}.ffn_gate", inner, width)
        weight(f"blk.{i}.ffn_up", inner, width)
        weight(f"blk.{i}.ffn_down", width, inner)
    norm("output_norm")
    finish(out)


def dequantise(source, path):
    reader = gguf.GGUFReader(source)
    out = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    written_by_the_writer = ("GGUF.", "general.architecture", "general.file_type")
    for name, field in reader.fields.items():
        if name.startswith(written_by_the_writer):
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        out.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        out.add_tensor(tensor.name, values.astype(numpy.float32))
    finish(out)


def finish(out):
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kind = parser.add_subparsers(dest="kind", required=True)
    random = kind.add_parser("random", help="write a small random model")
    random.add_argument("output")
    random.add_argument("--blocks", type=int, default=4)
    random.add_argument("--width", type=int, default=64)
    random.add_argument("--heads", type=int, default=4)
    random.add_argument("--seed", type=int, default=0)
    plain = kind.add_parser("dequantise", help="write a model's values in float32")
    plain.add_argument("source")
    plain.add_argument("output")
    options = parser.parse_args()
    if options.kind == "random":
        random_model(options.output, options.blocks, options.width, options.heads, options.seed)
    else:
        dequantise(options.source, options.output)


if __name__ == "__main__":
    main()
