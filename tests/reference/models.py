#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Makes models/: tiny random models of four architectures and what Hugging Face computes with them.

    pip install torch transformers safetensors
    python models.py                                        # tests/reference/models, which the tests read
    python models.py --random 60 --seed 1 --check PROGRAM   # other configurations, drawn; nothing is kept

PROGRAM is rflow_tests_models; it compares its own sites with those of the drawn models.

Each folder holds a checkpoint in Hugging Face's layout and sites.safetensors: `ids` (tokens), and the
residual stream as hooks see it: `embed`, `block.i` raw, `final_norm`. All parameters are random, also
those that initialisation leaves at 0 or 1, so that none can be forgotten without a test noticing. What
is stored in half precision was rounded before it was used; everything is computed in fp32, with the
rotary frequencies in fp32, too.
"""
import argparse
import json
import os
import random
import shutil
import subprocess
import tempfile

import torch
import transformers as hf
from safetensors.torch import load_file, save_file

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "models")


def neo(**k):
    layers = k.pop("layers", 3)
    return hf.GPTNeoForCausalLM, hf.GPTNeoConfig(
        vocab_size=37, hidden_size=k.pop("hidden", 24), num_layers=layers, num_heads=k.pop("heads", 3), max_position_embeddings=k.pop("positions", 24),
        attention_types=k.pop("types", [[["global", "local"], 1], [["global"], 1]]), attention_dropout=0.0,
        embed_dropout=0.0, resid_dropout=0.0, **k)


def neox(**k):
    return hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig(
        vocab_size=37, hidden_size=k.pop("hidden", 24), num_hidden_layers=2, num_attention_heads=k.pop("heads", 2),
        intermediate_size=k.pop("inner", 40), max_position_embeddings=k.pop("positions", 32),
        rope_parameters={"rope_theta": k.pop("base", 10000.0), "partial_rotary_factor": k.pop("part", 0.25),
                         **k.pop("rope", {"rope_type": "default"})}, **k)


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
    "neox_odd_rotary": (neox(heads=3, hidden=30, part=0.3, inner=21), 19, {}),  # 3 of 10 features: two pairs turn
    # 50 * 0.58 is 28 in double, 29 in float
    "neox_rounded_rotary": (neox(heads=1, hidden=50, part=0.58, inner=9), 11, {"dtype": torch.bfloat16, "words": "older"}),
    "neox_linear": (neox(heads=2, hidden=24, part=0.5, rope={"type": "linear", "factor": 2.5}), 23, {}),
    "neox_linear_odd": (neox(heads=2, hidden=40, part=0.25, rope={"rope_type": "linear", "factor": 4.0}), 29,
                        {"dtype": torch.float16, "words": "older"}),
    "neox_full_rotary": (neox(part=1.0, base=500.0, attention_bias=False, hidden_act="gelu_new"), 17, {"bare": True}),
    "mamba_plain": (mamba(hidden=40), 21, {}),
    "mamba_biases": (mamba(use_bias=True, hidden=33, time_step_rank=5, state=16, expand=1), 9, {"dtype": torch.bfloat16}),
    "mamba_other_names": (mamba(conv_kernel=3, use_conv_bias=False, state=5), 15, {"mamba_ssm": True}),
    "mamba_original": (mamba(hidden=21, state=7, conv_kernel=2, use_bias=True, time_step_rank=3, expand=3), 16,
                       {"mamba_ssm": True, "words": "original"}),
    "mamba2_original": (mamba2(groups=2, heads=6, width=5, hidden=15, state=9, time_step_limit=(0.02, 0.3)), 27,
                        {"mamba_ssm": True, "words": "original"}),
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


def older_keys(c):
    """GPT-NeoX's config.json as transformers 4 wrote it."""
    rope = c.pop("rope_parameters")
    c["rotary_pct"], c["rotary_emb_base"] = rope["partial_rotary_factor"], rope["rope_theta"]
    if rope["rope_type"] != "default":
        c["rope_scaling"] = {"type": rope["rope_type"], "factor": rope["factor"]}
    c["torch_dtype"] = c.pop("dtype")
    return c


def original_keys(c):
    """The same Mamba in the words of the original package."""
    ssm = {"d_state": c["state_size"], "d_conv": c["conv_kernel"], "expand": c["expand"], "conv_bias": c["use_conv_bias"],
           "bias": c["use_bias"]}
    if c["model_type"] == "mamba":
        ssm.update(layer="Mamba1", dt_rank=c["time_step_rank"])
    else:
        ssm.update(layer="Mamba2", headdim=c["head_dim"], ngroups=c["n_groups"], chunk_size=c["chunk_size"],
                   rmsnorm=True, norm_before_gate=False,
                   dt_limit=[float(x["__float__"]) if isinstance(x, dict) else x for x in c["time_step_limit"]])
    return {"d_model": c["hidden_size"], "d_intermediate": 0, "n_layer": c["num_hidden_layers"],
            "vocab_size": c["vocab_size"] - 1, "ssm_cfg": ssm, "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True,
            "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": c["vocab_size"],
            "tie_embeddings": c["tie_word_embeddings"]}


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
def make(root, name, model_class, config, tokens, dtype=torch.float32, shards=False, bare=False, buffers=False,
         mamba_ssm=False, words=""):
    """words: "older" or "original" for a config.json in other words."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    config._attn_implementation = "eager"
    model = model_class(config).float().eval()
    randomise(model, generator)
    for p in model.parameters():  # what is stored is what is computed with; buffers are never rounded
        p.copy_(p.to(dtype))
    ids = torch.randint(0, config.vocab_size, (tokens,), generator=generator)
    folder = os.path.join(root, name)
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
    if words:
        path = os.path.join(folder, "config.json")
        with open(path) as file:
            c = json.load(file)
        c = {"older": older_keys, "original": original_keys}[words](c)
        with open(path, "w") as file:
            json.dump(c, file, indent=2, sort_keys=True)
        if words == "older":  # transformers understands them as meant
            read, meant = hf.AutoConfig.from_pretrained(folder).rope_parameters, config.rope_parameters
            assert all(read[key] == meant[key] for key in read if key != "type"), (read, meant)
    print(name, {k: round(v.abs().mean().item(), 2) for k, v in found.items()})


def draw(r, family):
    """A configuration: odd sizes, every option that transformers has and rflow reads."""
    tied, epsilon = r.random() < 0.5, r.choice([1e-5, 1e-6, 1e-3])
    stored = {"dtype": r.choice([torch.float32, torch.float16, torch.bfloat16]), "shards": r.random() < 0.2}
    stored["bare"] = not stored["shards"] and r.random() < 0.2
    gelu = r.choice(["gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python", "gelu_accurate"])
    heads = r.randint(1, 5)
    if family == "neo":
        types = [[[r.choice(["global", "local"]) for _ in range(r.randint(1, 2))], r.randint(1, 2)]
                 for _ in range(r.randint(1, 2))]
        return neo(hidden=heads * r.randint(1, 13), heads=heads, types=types, layers=sum(len(k) * n for k, n in types),
                   positions=90, window_size=r.randint(1, 40), intermediate_size=r.choice([None, r.randint(1, 50)]),
                   activation_function=gelu, layer_norm_epsilon=epsilon, tie_word_embeddings=tied), stored
    if family == "neox":
        while True:
            width, part = r.randint(2, 33), r.choice([0.25, 0.29, 0.3, 0.5, 0.57, 1.0, r.random()])
            count = int(width * part)
            if count % 2 == 0 or count < width:
                break
        rope = {"rope_type": "default"}
        if r.random() < 0.4:
            rope = {r.choice(["type", "rope_type"]): "linear", "factor": r.choice([2.0, 4, r.uniform(1, 9)])}
        if r.random() < 0.4:
            stored["words"] = "older"
        return neox(hidden=heads * width, heads=heads, positions=700, part=part, base=r.choice([10000.0, 500.0, 1e6]), rope=rope,
                    inner=r.randint(1, 50), use_parallel_residual=r.random() < 0.5, attention_bias=r.random() < 0.5,
                    hidden_act=gelu, layer_norm_eps=epsilon, tie_word_embeddings=tied), stored
    original = r.random() < 0.4
    if original:
        stored.update(words="original", bare=False, shards=False, mamba_ssm=True)
        epsilon = 1e-5
    common = {"conv_kernel": r.randint(1, 5), "use_bias": r.random() < 0.5, "use_conv_bias": r.random() < 0.5,
              "layer_norm_epsilon": epsilon, "tie_word_embeddings": tied, "hidden_act": r.choice(["silu", "swish"]),
              "expand": r.randint(1, 3), "residual_in_fp32": r.random() < 0.5, "state": r.randint(1, 21)}
    if family == "mamba":
        return mamba(hidden=r.randint(1, 70), time_step_rank=r.choice(["auto", r.randint(1, 9)]), **common), stored
    groups, least = r.randint(1, 3), r.choice([0.0, r.uniform(0, 0.2)])
    hidden, heads, width = r.randint(1, 9), groups * r.randint(1, 3), r.randint(1, 9)
    return mamba2(hidden=hidden * heads * width, heads=heads * common["expand"], width=hidden * width, groups=groups,
                  time_step_limit=(least, r.choice([float("inf"), least + r.random()])), **common), stored


def check(program, count, seed):
    """Draws models, and has the tests compare what they compute."""
    r = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        for k in range(count):
            family = ("neo", "neox", "mamba", "mamba2")[k % 4]
            (model_class, config), stored = draw(r, family)
            tokens = r.randint(1, 700 if family == "neox" and r.random() < 0.3 else 60)
            make(folder, f"{family}_{seed}_{k}", model_class, config, tokens, **stored)
        return subprocess.run([program, "--test-case=*what Hugging Face computes*"], env={"RFLOW_TEST_MODELS": folder},
                              check=False).returncode


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--random", type=int, default=60, metavar="COUNT")
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--check", metavar="PROGRAM")
    options = arguments.parse_args()
    if options.check:
        raise SystemExit(check(options.check, options.random, options.seed))
    for name, ((model_class, config), tokens, stored) in CASES.items():
        make(HERE, name, model_class, config, tokens, **stored)
    with open(os.path.join(HERE, "README.md"), "w") as file:
        file.write("Tiny random models and what Hugging Face computes with them: made by ../models.py\n"
                   f"(torch {torch.__version__}, transformers {hf.__version__}).\n")
