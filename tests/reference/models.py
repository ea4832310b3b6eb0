#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Makes models/: tiny random models of four architectures and what Hugging Face computes with them.

    pip install torch transformers safetensors
    python models.py

Each folder holds a checkpoint in Hugging Face's layout and sites.safetensors: `ids` (tokens), and the
residual stream as hooks see it: `embed`, `block.i` raw, `final_norm`. All parameters are random, also
those that initialisation leaves at 0 or 1, so that none can be forgotten without a test noticing. What
is stored in half precision was rounded before it was used; everything is computed in fp32.
"""
import json
import os
import shutil

import torch
import transformers as hf
from safetensors.torch import load_file, save_file

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "models")


def neo(**k):
    layers = k.pop("layers", 3)
    return hf.GPTNeoForCausalLM, hf.GPTNeoConfig(
        vocab_size=37, hidden_size=24, num_layers=layers, num_heads=k.pop("heads", 3), max_position_embeddings=k.pop("positions", 24),
        attention_types=k.pop("types", [[["global", "local"], 1], [["global"], 1]]), attention_dropout=0.0,
        embed_dropout=0.0, resid_dropout=0.0, **k)


def neox(**k):
    return hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig(
        vocab_size=37, hidden_size=k.pop("hidden", 24), num_hidden_layers=2, num_attention_heads=k.pop("heads", 2),
        intermediate_size=40, max_position_embeddings=32,
        rope_parameters={"rope_type": "default", "rope_theta": k.pop("base", 10000.0),
                         "partial_rotary_factor": k.pop("part", 0.25)}, **k)


def mamba(**k):
    return hf.MambaForCausalLM, hf.MambaConfig(
        vocab_size=37, hidden_size=k.pop("hidden", 20), num_hidden_layers=2, state_size=k.pop("state", 8), **k)


def mamba2(**k):
    return hf.Mamba2ForCausalLM, hf.Mamba2Config(
        vocab_size=37, hidden_size=k.pop("hidden", 16), num_hidden_layers=2, state_size=k.pop("state", 8),
        num_heads=k.pop("heads", 4), head_dim=k.pop("width", 8), n_groups=k.pop("groups", 1), chunk_size=8, **k)


# name: model, tokens, and how it is stored
CASES = {
    "neo_windows": (neo(window_size=40, positions=150), 150, {}),
    "neo_all_global": (neo(types=[[["global"], 3]], heads=2, intermediate_size=32), 11, {"dtype": torch.bfloat16}),
    "neo_all_local": (neo(types=[[["local"], 2]], layers=2, window_size=3, activation_function="gelu"), 14,
                      {"buffers": True}),
    "neox_parallel": (neox(heads=3, part=0.5), 19, {"shards": True}),
    "neox_sequential": (neox(use_parallel_residual=False, part=0.25, hidden=32), 13, {"dtype": torch.float16}),
    "neox_full_rotary": (neox(part=1.0, base=500.0, attention_bias=False, hidden_act="gelu_new"), 17, {"bare": True}),
    "mamba_plain": (mamba(hidden=40), 21, {}),
    "mamba_biases": (mamba(use_bias=True, hidden=33, time_step_rank=5, state=16, expand=1), 9, {"dtype": torch.bfloat16}),
    "mamba_other_names": (mamba(conv_kernel=3, use_conv_bias=False, state=5), 15, {"mamba_ssm": True}),
    "mamba2_one_group": (mamba2(), 21, {}),
    "mamba2_two_groups": (mamba2(groups=2, width=8, heads=4, use_bias=True), 18, {}),
    "mamba2_four_groups": (mamba2(groups=4, heads=8, width=4, state=6, time_step_limit=(0.01, 0.2)), 13,
                           {"mamba_ssm": True, "dtype": torch.float16}),
}


def randomise(model, generator):
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if name.endswith("A_log"):
            p.copy_(0.5 * noise)
        elif name.endswith((".dt_bias", "dt_proj.bias")):
            p.copy_(-2 + noise)
        elif p.dim() == 1 and name.endswith((".D", "weight")):
            p.copy_(1 + 0.3 * noise)
        elif p.dim() == 1:
            p.copy_(0.3 * noise)
        elif "conv1d" in name:
            p.copy_(0.5 * noise)
        elif "wte" in name or "wpe" in name or "embed" in name:
            p.copy_(noise)
        else:
            p.copy_(noise * p.shape[-1] ** -0.5)


def sites(model, ids):
    base = model.base_model
    if hasattr(base, "h"):
        blocks, last = base.h, base.ln_f
    else:
        blocks = base.layers
        last = base.norm_f if hasattr(base, "norm_f") else base.final_layer_norm
    out = {}

    def keep(name):
        def hook(module, inputs, output):
            out[name] = (output[0] if isinstance(output, tuple) else output)[0].clone().contiguous()
        return hook

    handles = [blocks[0].register_forward_pre_hook(lambda module, inputs: out.update(embed=inputs[0][0].clone()))]
    handles += [b.register_forward_hook(keep(f"block.{i}")) for i, b in enumerate(blocks, 1)]
    handles.append(last.register_forward_hook(keep("final_norm")))
    model(ids[None])
    for handle in handles:
        handle.remove()
    return out


@torch.no_grad()
def make(name, model_class, config, tokens, dtype=torch.float32, shards=False, bare=False, buffers=False,
         mamba_ssm=False):
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    config._attn_implementation = "eager"
    model = model_class(config).float().eval()
    randomise(model, generator)
    model.to(dtype).float()  # what is stored is what is computed with
    ids = torch.randint(0, config.vocab_size, (tokens,), generator=generator)
    folder = os.path.join(HERE, name)
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    found = sites(model, ids)
    save_file({"ids": ids, **found}, os.path.join(folder, "sites.safetensors"))
    stored = model.base_model if bare else model
    stored.to(dtype).save_pretrained(folder, max_shard_size="16KB" if shards else "1GB")
    if os.path.exists(os.path.join(folder, "generation_config.json")):
        os.remove(os.path.join(folder, "generation_config.json"))
    weights = os.path.join(folder, "model.safetensors")
    if buffers:  # as older files carry them
        tensors = load_file(weights)
        tensors["transformer.h.0.attn.attention.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.bool)
        tensors["transformer.h.0.attn.attention.masked_bias"] = torch.tensor(-1e9)
        save_file(tensors, weights)
    if mamba_ssm:
        tensors = load_file(weights)
        tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
        save_file(tensors, weights)
    print(name, {k: round(v.abs().mean().item(), 2) for k, v in found.items()})


if __name__ == "__main__":
    for name, ((model_class, config), tokens, stored) in CASES.items():
        make(name, model_class, config, tokens, **stored)
    with open(os.path.join(HERE, "README.md"), "w") as file:
        file.write("Tiny random models and what Hugging Face computes with them: made by ../models.py\n"
                   f"(torch {torch.__version__}, transformers {hf.__version__}).\n")
