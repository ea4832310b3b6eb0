#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Trains a small GPT-NeoX or a small Mamba on key-value retrieval over integer tokens, on one CPU core.

    python train.py neox  OUT_DIR --seed 1
    python train.py mamba OUT_DIR --seed 1

A sequence is n pairs in random order and then queries:  k1 v1 … kn vn | q1 a1 q2 a2 … . Keys are tokens
1 … 16, values 17 … 32, keys of one sequence are distinct. The model is asked for the answer at each query;
accuracy is counted at the first query alone, which is the prompt that rflow_study measures. The number of pairs
grows with the accuracy and is drawn anew for each batch, so that one model serves several context lengths.

OUT_DIR gets model.safetensors (fp16) and config.json in Hugging Face layout, and training.json: the seed, the
settings, the accuracy by number of pairs on sequences that were not trained on, the CPU time.
"""
import argparse
import json
import os
import time

import torch
from torch.nn import functional as F

KEYS = VALUES = 16
VOCABULARY = 1 + KEYS + VALUES + 3  # 0 and the last three are unused
LENGTHS = [4, 8, 12, 16]


class Scan(torch.autograd.Function):
    """s_t = a_t s_{t-1} + u_t over the first axis: one fused step per token, forward and back."""

    @staticmethod
    def forward(ctx, a, u):
        states = torch.empty_like(u)
        states[0] = u[0]
        for t in range(1, len(u)):
            torch.addcmul(u[t], a[t], states[t - 1], out=states[t])
        ctx.save_for_backward(a, states)
        return states

    @staticmethod
    def backward(ctx, grad):
        a, states = ctx.saved_tensors
        g = grad.clone()
        for t in range(len(a) - 2, -1, -1):
            g[t].addcmul_(a[t + 1], g[t + 1])
        grad_a = torch.zeros_like(a)
        torch.mul(g[1:], states[:-1], out=grad_a[1:])
        return grad_a, g


def mixer(self, hidden_states, *_, **__):
    """Hugging Face's Mamba mixer with the scan above in place of its loop."""
    tokens = hidden_states.shape[1]
    x, z = self.in_proj(hidden_states).chunk(2, dim=-1)
    x = F.silu(self.conv1d(x.transpose(1, 2))[..., :tokens]).transpose(1, 2)
    n = self.ssm_state_size
    dt, b, c = torch.split(self.x_proj(x), [self.time_step_rank, n, n], dim=-1)
    dt = F.softplus(self.dt_proj(dt)).transpose(0, 1)
    decay = torch.exp(dt.unsqueeze(-1) * -torch.exp(self.A_log))
    entry = (dt * x.transpose(0, 1)).unsqueeze(-1) * b.transpose(0, 1).unsqueeze(2)
    states = Scan.apply(decay, entry)
    y = torch.matmul(states, c.transpose(0, 1).unsqueeze(-1)).squeeze(-1).transpose(0, 1)
    return self.out_proj((y + x * self.D) * F.silu(z))


def build(name, layers, hidden):
    import transformers as hf

    if name == "neox":
        config = hf.GPTNeoXConfig(
            vocab_size=VOCABULARY, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 32,
            intermediate_size=4 * hidden, max_position_embeddings=256, hidden_act="gelu", use_parallel_residual=True,
            tie_word_embeddings=False, initializer_range=0.08,
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 1.0}, attention_dropout=0.0, hidden_dropout=0.0, use_cache=False)
        return hf.GPTNeoXForCausalLM(config)
    config = hf.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, num_hidden_layers=layers, state_size=16, expand=2,
        residual_in_fp32=True, use_cache=False,
        time_step_min=0.005, time_step_max=0.2)
    model = hf.MambaForCausalLM(config)
    check = torch.randint(1, VOCABULARY, (2, 9))
    with torch.no_grad():
        slow = model(check).logits
        type(model.backbone.layers[0].mixer).forward = mixer
        fast = model(check).logits
    assert torch.allclose(slow, fast, atol=1e-5), "the scan disagrees with Hugging Face's"
    return model


def sequences(pairs, batch, queries, generator):
    """(batch, 2·pairs + 2·queries) tokens: the pairs, then queries with their answers."""
    order = torch.rand(batch, KEYS, generator=generator).argsort(dim=1)[:, :pairs]
    keys = 1 + order
    values = 1 + KEYS + torch.randint(0, VALUES, (batch, pairs), generator=generator)
    asked = torch.rand(batch, pairs, generator=generator).argsort(dim=1)[:, :queries]
    context = torch.stack([keys, values], dim=2).flatten(1)
    questions = torch.stack([keys.gather(1, asked), values.gather(1, asked)], dim=2).flatten(1)
    return torch.cat([context, questions], dim=1)


@torch.no_grad()
def accuracy(model, pairs, generator, count=512):
    tokens = sequences(pairs, count, 1, generator)
    logits = model(tokens[:, :-1]).logits[:, -1]
    return (logits.argmax(-1) == tokens[:, -1]).float().mean().item()


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("model", choices=["neox", "mamba"])
    arguments.add_argument("out")
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--layers", type=int)
    arguments.add_argument("--hidden", type=int, default=64)
    arguments.add_argument("--batch", type=int, default=128)
    arguments.add_argument("--rate", type=float, default=3e-3)
    arguments.add_argument("--minutes", type=float, default=29.0, help="CPU minutes at most")
    options = arguments.parse_args()
    layers = options.layers or {"neox": 4, "mamba": 6}[options.model]

    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    held_out = torch.Generator().manual_seed(1_000_000 + options.seed)
    start = time.process_time()
    model = build(options.model, layers, options.hidden)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{options.model}: {layers} layers of {options.hidden}, {parameters} parameters", flush=True)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
                                  lr=options.rate, betas=(0.9, 0.98))
    reached = 1  # LENGTHS[:reached] are trained on
    step, solved, rate = 0, 0, options.rate
    log = []
    budget = 60 * options.minutes
    while True:
        used = (time.process_time() - start) / budget
        if used >= 1 or solved >= 3:
            break
        warm = min(1.0, (step + 1) / 200)
        cool = min(1.0, max(0.05, (1 - used) / 0.25))
        for group in optimizer.param_groups:
            group["lr"] = rate * warm * cool
        at = torch.randint(0, reached, (1,), generator=generator).item()
        pairs = LENGTHS[max(at, torch.randint(0, reached, (1,), generator=generator).item())]
        tokens = sequences(pairs, options.batch, pairs, generator)
        logits = model(tokens[:, :-1]).logits[:, 2 * pairs:][:, ::2]
        answers = tokens[:, 2 * pairs + 1::2]
        loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            model.eval()
            right = {p: accuracy(model, p, held_out, 256) for p in LENGTHS[: reached + 1]}
            model.train()
            seconds = time.process_time() - start
            print(f"step {step} {seconds:.0f} s  pairs {pairs} loss {loss.item():.3f}  "
                  + "  ".join(f"{p}: {r:.3f}" for p, r in right.items()), flush=True)
            log.append({"step": step, "seconds": round(seconds), "loss": round(loss.item(), 4), "accuracy": right})
            if reached < len(LENGTHS) and right[LENGTHS[reached - 1]] >= 0.9:
                reached += 1
            solved = solved + 1 if reached == len(LENGTHS) and min(right.values()) >= 0.99 else 0

    model.half().float().eval()  # what is saved is what is scored
    right = {p: accuracy(model, p, held_out, 2048) for p in LENGTHS}
    seconds = time.process_time() - start
    os.makedirs(options.out, exist_ok=True)
    model.half().save_pretrained(options.out)
    with open(os.path.join(options.out, "training.json"), "w") as file:
        json.dump({"model": options.model, "task": "key-value retrieval", "keys": KEYS, "values": VALUES,
                   "seed": options.seed, "layers": layers, "hidden": options.hidden, "parameters": parameters,
                   "steps": step, "batch": options.batch, "rate": options.rate, "cpu_seconds": round(seconds),
                   "accuracy": right, "torch": torch.__version__, "log": log}, file, indent=1)
    print("accuracy by pairs:", right, f"{seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
