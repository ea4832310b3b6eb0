#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Capture one text's hidden states, site by site, from a Hugging Face model into one safetensors file.

Sites are read by forward hooks and not from the `hidden_states` tuple, because that tuple means something
else in every family: some drop the embedding, some put the final norm in place of the last block.

    embed        what enters block 1: token embedding, positions and embedding norm already applied
    block.i      what leaves block i, before the final norm (i from 1)
    final_norm   what leaves the final norm; absent where the model has none (BERT and its kin)
"""

import argparse
import hashlib
import json
import os
import struct
import sys
import tempfile

FORMAT_VERSION = "1"
SITES = "embed = input of block 1; block.i = raw output of block i, i from 1"
SITES_NORM = "; final_norm = output of the final norm"

# Names inside the base model that AutoModel returns; the first match wins. An empty norm means there is none.
KNOWN_LAYOUTS = [
    # (blocks, final norm)
    ("layers", "final_layer_norm"),                  # GPT-NeoX
    ("layers", "norm_f"),                            # Mamba, Mamba-2
    ("layers", "norm"),                              # Llama, Mistral, Qwen, Gemma, OLMo and relatives
    ("layers", "final_layernorm"),                   # Phi, Persimmon
    ("layers", "final_norm"),                        # ModernBERT
    ("h", "ln_f"),                                   # GPT-2, GPT-Neo, GPT-J, BLOOM, Falcon
    ("blocks", "norm_f"),                            # MPT
    ("decoder.layers", "decoder.final_layer_norm"),  # OPT
    ("encoder.layer", ""),                           # BERT, RoBERTa, ELECTRA, MiniLM
    ("transformer.layer", ""),                       # DistilBERT
]
# Wrappers that may stand around the base model, in checkpoints with code or heads of their own.
WRAPPERS = ["", "model.", "transformer.", "gpt_neox.", "backbone.", "bert.", "roberta.", "language_model."]


class UserError(Exception):
    """Something the caller can mend; shown as one line."""


def warn(text):
    print(f"capture.py: warning: {text}", file=sys.stderr)


def one_line(error):
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        prog="capture.py", description="Capture a model's hidden states on one text into a safetensors file.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="a local directory, or a name on the model hub")
    source.add_argument("--gguf", metavar="FILE", help="a GGUF file; its weights are dequantised")
    parser.add_argument("--revision", help="hub revision (branch, tag or commit)")
    parser.add_argument("--tokenizer", help="tokenizer directory or name, if it is not beside the model")
    parser.add_argument("--name", help="model name to record (default: the model's path or name)")
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text to run, as one sequence")
    parser.add_argument("--text-title", help="title to record (default: the file's name)")
    parser.add_argument("--text-origin", default="", help="where the text comes from, to record")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="use the first N tokens only")
    parser.add_argument("--no-special-tokens", action="store_true",
                        help="do not let the tokenizer add BOS, [CLS], [SEP] and the like")
    parser.add_argument("--dtype", choices=["bf16", "f16", "f32"], default="bf16", help="stored type (default bf16)")
    parser.add_argument("--compute", choices=["f32", "bf16", "f16"], default="f32",
                        help="type the model runs in (default f32)")
    parser.add_argument("--device", default="cpu", help="torch device (default cpu)")
    parser.add_argument("--blocks", metavar="PATH", help="module path of the list of blocks, e.g. model.layers")
    parser.add_argument("--final-norm", metavar="PATH", help="module path of the final norm, or 'none'")
    parser.add_argument("--embedding", metavar="PATH",
                        help="module whose output is X_0 (default: whatever enters the first block)")
    parser.add_argument("--output", required=True, metavar="FILE", help="safetensors file to write")
    options = parser.parse_args(argv)
    if options.max_tokens is not None and options.max_tokens < 1:
        parser.error("--max-tokens must be at least 1")
    if options.gguf and options.revision:
        parser.error("--revision goes with --model")
    return options


def read_text(path):
    try:
        with open(path, "rb") as file:
            raw = file.read()
        text = raw.decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start})")
    # Editors end a file with a newline; it is not part of the text.
    text = text.strip()
    if not text:
        raise UserError(f"{path} holds no text")
    return text


def sha256_of_file(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def load(options, torch, transformers):
    """Return model, tokenizer, and the names and revision to record."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    compute = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[options.compute]
    arguments = {"dtype": compute}
    if options.gguf:
        if not os.path.isfile(options.gguf):
            raise UserError(f"no such file: {options.gguf}")
        folder, file = os.path.split(os.path.abspath(options.gguf))
        place, arguments["gguf_file"] = folder, file
        name = options.name or file
    else:
        place = options.model
        looks_local = os.path.isabs(place) or place.startswith(".") or place.count("/") > 1
        if looks_local and not os.path.isdir(place):
            raise UserError(f"no such model directory: {place}")
        if options.revision:
            arguments["revision"] = options.revision
        name = options.name or (os.path.basename(os.path.abspath(place)) if os.path.isdir(place) else place)

    try:
        model = transformers.AutoModel.from_pretrained(place, **arguments)
    except Exception as error:  # the loaders raise nearly every built-in type
        raise UserError(f"cannot load model {name}: {one_line(error)}")
    if getattr(model.config, "is_encoder_decoder", False):
        raise UserError(f"{name} is an encoder-decoder model: it has two chains, and this script captures one")

    arguments.pop("dtype")
    if options.tokenizer:
        arguments = {}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(options.tokenizer or place, **arguments)
    except Exception as error:
        raise UserError(f"cannot load the tokenizer of {name}: {one_line(error)}")

    if options.gguf:
        revision = "sha256:" + sha256_of_file(options.gguf)
    elif os.path.isfile(os.path.join(place, "model.safetensors")):
        revision = "sha256:" + sha256_of_file(os.path.join(place, "model.safetensors"))
    else:
        revision = getattr(model.config, "_commit_hash", None) or options.revision or "local"
    try:
        model = model.to(options.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"cannot use device {options.device}: {one_line(error)}")
    model.config.use_cache = False
    return model.eval(), tokenizer, name, revision


def tokenize(tokenizer, text, options, limit):
    arguments = {"return_tensors": "pt", "add_special_tokens": not options.no_special_tokens}
    if options.max_tokens:
        # Truncation by the tokenizer keeps a closing [SEP] where the model was trained with one.
        arguments.update(truncation=True, max_length=options.max_tokens)
    try:
        encoded = tokenizer(text, **arguments)
    except Exception as error:
        raise UserError(f"cannot tokenise the text: {one_line(error)}")
    count = encoded["input_ids"].shape[1]
    if count == 0:
        raise UserError("the text has no tokens")
    if limit and count > limit:
        raise UserError(f"the text has {count} tokens and the model takes {limit}: use --max-tokens {limit}")
    return encoded


def submodule(model, path):
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def locate(model, options, torch):
    """Return (blocks, final norm or None), by the caller's paths or by the known layouts."""
    if options.blocks:
        blocks = submodule(model, options.blocks)
        if blocks is None:
            raise UserError(f"--blocks: the model has no module {options.blocks}; it has {children(model)}")
        if not isinstance(blocks, (torch.nn.ModuleList, torch.nn.Sequential)) or len(blocks) == 0:
            raise UserError(f"--blocks: {options.blocks} is a {type(blocks).__name__}, not a list of blocks")
        norm_path = options.final_norm
        if norm_path is None:
            raise UserError("--blocks needs --final-norm PATH, or --final-norm none")
    else:
        for prefix, (path, norm) in ((w, l) for w in WRAPPERS for l in KNOWN_LAYOUTS):
            blocks = submodule(model, prefix + path)
            if not isinstance(blocks, torch.nn.ModuleList) or len(blocks) == 0:
                continue
            if norm and submodule(model, prefix + norm) is None:
                continue
            norm_path = options.final_norm or (prefix + norm if norm else "none")
            break
        else:
            raise UserError(f"{type(model).__name__} has no layout known here: give --blocks and --final-norm; "
                            f"it has {children(model)}")
    if norm_path == "none":
        return list(blocks), None
    final_norm = submodule(model, norm_path)
    if final_norm is None:
        raise UserError(f"--final-norm: the model has no module {norm_path}; it has {children(model)}")
    return list(blocks), final_norm


def children(model):
    return ", ".join(name for name, _ in model.named_children()) or "no modules"


def run(model, encoded, blocks, final_norm, options, torch):
    """One forward pass; return {site: [tokens, hidden] tensor on the CPU}."""
    taken, entered, handles = {}, {}, []

    def first_tensor(value, site):
        # Blocks return a tensor in some families and versions, a tuple led by it in others.
        if isinstance(value, (tuple, list)) and value:
            value = value[0]
        if not torch.is_tensor(value) or value.dim() != 3 or value.shape[0] != 1:
            what = tuple(value.shape) if torch.is_tensor(value) else type(value).__name__
            raise UserError(f"{site}: expected a (1, tokens, hidden) tensor, got {what}")
        return value[0].detach()

    def keep(site):
        def hook(module, arguments, output):
            if site in taken:
                raise UserError(f"{site} ran twice in one pass: its module is shared or is not a block")
            # A copy: later code may add to the same storage in place.
            taken[site] = first_tensor(output, site).clone()
        return hook

    def keep_input(site):
        def hook(module, arguments, named):
            value = arguments[0] if arguments else named.get("hidden_states")
            entered[site] = first_tensor(value, f"input of {site}").clone()
        return hook

    if options.embedding:
        module = submodule(model, options.embedding)
        if module is None:
            raise UserError(f"--embedding: the model has no module {options.embedding}; it has {children(model)}")
        handles.append(module.register_forward_hook(keep("embed")))
    for number, block in enumerate(blocks, 1):
        handles.append(block.register_forward_pre_hook(keep_input(f"block.{number}"), with_kwargs=True))
        handles.append(block.register_forward_hook(keep(f"block.{number}")))
    if final_norm is not None:
        handles.append(final_norm.register_forward_pre_hook(keep_input("final_norm"), with_kwargs=True))
        handles.append(final_norm.register_forward_hook(keep("final_norm")))
    try:
        with torch.inference_mode():
            model(**{key: value.to(model.device) for key, value in encoded.items()})
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"the forward pass failed: {one_line(error)}")
    finally:
        for handle in handles:
            handle.remove()

    if not options.embedding and "block.1" in entered:
        taken["embed"] = entered["block.1"]
    sites = ["embed"] + [f"block.{i}" for i in range(1, len(blocks) + 1)]
    sites += ["final_norm"] if final_norm is not None else []
    missing = [site for site in sites if site not in taken]
    if missing:
        raise UserError(f"{missing[0]} never ran ({len(missing)} of {len(sites)} sites missing)")

    # The sites are a chain only if each block starts from what the one before it left.
    for before, after in zip(sites, sites[1:]):
        if not torch.equal(taken[before].to(entered[after].dtype), entered[after]):
            warn(f"what enters {after} is not {before}: something between them changes the representation")
    shape = taken["embed"].shape
    for site in sites:
        if taken[site].shape != shape:
            raise UserError(f"{site} is {tuple(taken[site].shape)}, embed is {tuple(shape)}: not one residual stream")
    return {site: taken[site].cpu() for site in sites}


def store(states, dtype, torch):
    """Round to the stored type; return {site: little-endian bytes}."""
    target = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[dtype]
    stored = {}
    for site, value in states.items():
        rounded = value.to(target)
        bad = ~torch.isfinite(value)
        if bool(bad.any()):
            token, feature = (int(i) for i in bad.nonzero()[0])
            warn(f"{site} has a NaN or an infinity at token {token}, feature {feature}")
        elif not bool(torch.isfinite(rounded).all()):
            raise UserError(f"{site} reaches {float(value.abs().max()):.6g}, too large for {dtype}: "
                            "use --dtype bf16 or f32")
        if dtype == "f32":
            stored[site] = rounded.numpy().astype("<f4").tobytes()
        else:
            stored[site] = rounded.contiguous().view(torch.int16).numpy().astype("<i2").tobytes()
    return stored


def write_safetensors(path, stored, shape, dtype, metadata):
    """Write beside the target and rename, so that a reader never meets half a file.

    Written by hand because the usual writer puts the metadata in a random order; here the same
    capture gives the same bytes.
    """
    header, offset = {"__metadata__": metadata}, 0
    for site, raw in stored.items():
        header[site] = {"dtype": dtype.upper(), "shape": list(shape), "data_offsets": [offset, offset + len(raw)]}
        offset += len(raw)
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    folder = os.path.dirname(os.path.abspath(path))
    try:
        handle, temporary = tempfile.mkstemp(prefix=".capture-", suffix=".tmp", dir=folder)
    except OSError as error:
        raise UserError(f"cannot write in {folder}: {error.strerror}")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(struct.pack("<Q", len(text)))
            file.write(text)
            for raw in stored.values():
                file.write(raw)
            # mkstemp makes private files; give this one the permissions of any other.
            mask = os.umask(0)
            os.umask(mask)
            os.fchmod(file.fileno(), 0o666 & ~mask)
        os.replace(temporary, path)
    except OSError as error:
        os.unlink(temporary)
        raise UserError(f"cannot write {path}: {error.strerror}")
    except BaseException:
        os.unlink(temporary)
        raise


def token_hash(ids):
    """SHA-256 over the token ids, each as an 8-byte little-endian signed integer, special tokens included."""
    return hashlib.sha256(struct.pack(f"<{len(ids)}q", *ids)).hexdigest()


def capture(options):
    text = read_text(options.text)
    if os.path.isdir(options.output):
        raise UserError(f"--output {options.output} is a directory")
    if not os.path.isdir(os.path.dirname(os.path.abspath(options.output))):
        raise UserError(f"no such directory: {os.path.dirname(options.output)}")
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        import torch
        import transformers
        if options.gguf:
            # transformers needs both, and says so less plainly.
            import accelerate  # noqa: F401
            import gguf  # noqa: F401
    except ImportError as error:
        raise UserError(f"{one_line(error)}; install what examples/capture/requirements.txt lists")

    model, tokenizer, name, revision = load(options, torch, transformers)
    blocks, final_norm = locate(model, options, torch)
    encoded = tokenize(tokenizer, text, options, getattr(model.config, "max_position_embeddings", None))
    ids = encoded["input_ids"][0].tolist()
    states = run(model, encoded, blocks, final_norm, options, torch)
    tokens, hidden = states["embed"].shape
    stored = store(states, options.dtype, torch)
    metadata = {
        "rflow_capture": FORMAT_VERSION,
        "model": name,
        "revision": revision,
        "architecture": type(model).__name__,
        "layers": str(len(blocks)),
        "hidden": str(hidden),
        "tokens": str(tokens),
        "sites": SITES + (SITES_NORM if final_norm is not None else ""),
        "dtype": options.dtype,
        "compute_dtype": options.compute,
        "tokenizer": options.tokenizer or name,
        "token_hash": token_hash(ids),
        "text_title": options.text_title or os.path.basename(options.text),
        "text_origin": options.text_origin,
        "text_sha256": hashlib.sha256(text.encode("utf-8")).hexdigest(),
        "captured_with": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }
    write_safetensors(options.output, stored, (tokens, hidden), options.dtype, metadata)
    print(f"{options.output}: {len(states)} sites, {tokens} tokens, hidden {hidden}, {options.dtype}, "
          f"tokens {metadata['token_hash'][:12]}")


def main(argv=None):
    options = parse_arguments(argv)
    try:
        capture(options)
    except UserError as error:
        print(f"capture.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
