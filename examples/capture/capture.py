#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Capture a model's hidden states, site by site, into one safetensors file.

    embed        what enters block 1: token embedding, positions and embedding norm already applied
    block.i      what leaves block i, before the final norm (i from 1)
    final_norm   what leaves the final norm; absent where the model has none (BERT and its kin)

On the command line, a text or a file of prompts runs through a Hugging Face model. As a module, `capture` takes any
torch model and its inputs.
"""

import argparse
import hashlib
import json
import logging
import os
import struct
import sys
from array import array
from collections.abc import Mapping

from capture_errors import CaptureError, TooLarge, is_out_of_memory, note, one_line
from capture_file import PartialFile
from capture_model import Rounding, Rows, Taps, module_at, revision_of, sha256_of_file, side_of, takes
from capture_prompts import encode, labels_of, plan, read_prompts, read_text, texts_of

FORMAT_VERSION = "1"
SITES = "embed = input of block 1; block.i = raw output of block i, i from 1"
SITES_NORM = "; final_norm = output of the final norm"
STORED = {"bf16": "BF16", "f16": "F16", "f32": "F32"}


# ---- as a module --------------------------------------------------------------------------------


def capture(model, inputs, *, side=None, blocks=None, final_norm=None, embedding=None, dtype=None, batch=None,
            output=None, labels=None, tokenizer=None, metadata=None):
    """Run a model on inputs that are in memory; return what every site held.

        sites = capture(model, tokenizer(["one text", "another"], padding=True, return_tensors="pt"))
        sites["block.3"]    # (tokens of all sequences, hidden)

    Padding is left out: rows of the sequences follow each other, and `sequences` says where each begins. Padding may
    be on either side; sequences padded on the left run with it on the right, so that positions count from the first
    token. The model runs in evaluation mode and without gradients, and is left as it was.

    model       torch module, called as model(**inputs). Of a model with a head, give the part below it
                (model.base_model, where transformers made it): the head's work is not needed.
    inputs      mapping of tensors with the batch first, as tokenizers and processors return it (input_ids,
                pixel_values, input_features, ...), or an iterable of such mappings, whose sequences follow each
                other. attention_mask, (batch, tokens) and zero for padding, says what is left out; for the decoder's
                side decoder_attention_mask does. Without a mask every row is a token.
    side        "encoder" or "decoder" of a model that has both; the encoder runs alone
    blocks      module path of the list of blocks; default: the one list called layers, layer, h, block or blocks
    final_norm  module path of the final norm, or "none"; default: the norm that takes in what the last block leaves
    embedding   module path whose output is `embed`; default: whatever enters the first block
    dtype       "bf16", "f16" or "f32": round to that; default: as the model computes
    batch       run so many sequences at a time; default: all of a mapping at once
    output      path of a safetensors file to write as well; it appears complete or not at all
    labels      integers of the sequences, or (sequences, tokens), padding included; for one mapping of inputs
    tokenizer   its text of every token is written with input_ids
    metadata    {str: str} to add to the file's

    Returns {name: CPU tensor}: "embed", "block.1" ... "block.L" and, if the model has one, "final_norm", each
    (n, hidden); "sequences", int64 offsets 0 ... n, one more than there are sequences; where the captured side has
    input_ids, "token_ids", (n) int64; with labels, "labels", (n) int64.
    Raises CaptureError, with one line of text, if the sites are not found or are not one residual stream, if shapes
    disagree, or if the file cannot be written. Out of memory is torch's own error.
    Memory: the result, and the sites of one batch.
    """
    import torch
    runner, stack = side_of(model, side)
    taps = Taps(runner, stack, blocks, final_norm, embedding)
    rounding = Rounding(dtype)
    of_decoder = "decoder_" if side == "decoder" else ""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    found, counts, ids, marks, leading = {}, [], [], [], ""
    with quiet(model, runner, stack):
        for given in [inputs] if isinstance(inputs, Mapping) else inputs:
            given = tensors_of(given)
            count = next(iter(given.values())).shape[0]
            if labels is not None:
                given[LABELS] = checked_labels(labels, count)
            for begin in range(0, count, batch or count):
                part = {name: value[begin:begin + (batch or count)] for name, value in given.items()}
                part = padded_right(part)
                mark = part.pop(LABELS, None)
                part = {name: value.to(device) for name, value in part.items()}
                if side == "encoder":
                    part = {name: value for name, value in part.items() if not name.startswith("decoder_")}
                rows = Rows(len(next(iter(part.values()))), part.get(of_decoder + "attention_mask"), runner)
                for site, kept in taps.run(part, rows, rounding).items():
                    found.setdefault(site, []).append(kept)
                counts += rows.counts
                leading = leading or leading_tokens(model, part, rows)
                named = part.get(of_decoder + "input_ids")
                if named is not None and named.shape[1] == rows.tokens:
                    ids.append(rows.take(named.cpu()[..., None], "token_ids")[:, 0])
                if mark is not None and mark.dim() == 1:
                    marks.append(mark.cpu().repeat_interleave(torch.tensor(rows.counts)))
                elif mark is not None:
                    if mark.shape[1] != rows.tokens:
                        raise CaptureError(f"labels are for {mark.shape[1]} tokens, and the model makes {rows.tokens}")
                    marks.append(rows.take(mark.cpu()[..., None], "labels")[:, 0])
    if not found:
        raise CaptureError("no inputs")
    out = {site: torch.cat(parts) for site, parts in found.items()}
    if 0 in counts:
        raise CaptureError(f"sequence {counts.index(0)} has no token: its attention_mask is zero throughout")
    out["sequences"] = torch.tensor([0, *counts]).cumsum(0)
    for name, parts in (("token_ids", ids), ("labels", marks)):
        if sum(map(len, parts)) == sum(counts):
            out[name] = torch.cat(parts).long()
    if output is not None:
        write(output, out, model, side, leading, tokenizer, metadata)
    return out


def tensors_of(given):
    """A mapping's tensors: arrays are taken for tensors, None is left out."""
    import torch
    out = {}
    if not isinstance(given, Mapping):
        raise CaptureError(f"inputs are a {type(given).__name__}: a mapping of tensors by name, or several, expected")
    for name, value in given.items():
        if value is None:
            continue
        try:
            out[name] = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            raise CaptureError(f"{name} is a {type(value).__name__}, not a tensor: "
                               "tokenizers and processors return tensors with return_tensors=\"pt\"")
    batches = {name: value.shape[0] if value.dim() else None for name, value in out.items()}
    if len(set(batches.values())) != 1 or None in batches.values():
        raise CaptureError("inputs without a common batch axis: "
                           + (", ".join(f"{name} {tuple(value.shape)}" for name, value in out.items()) or "nothing"))
    for name in ("attention_mask", "decoder_attention_mask"):
        if name in out and out[name].dim() != 2:
            raise CaptureError(f"{name} is {tuple(out[name].shape)}: (batch, tokens) expected")
    return out


LABELS = "labels of tokens"  # travels with the inputs, so that it is cut and moved like them; no argument is called so


def checked_labels(labels, count):
    import torch
    labels = torch.as_tensor(labels)
    if labels.is_floating_point() or labels.dim() not in (1, 2) or labels.shape[0] != count:
        raise CaptureError(f"labels are {tuple(labels.shape)} {str(labels.dtype)[6:]}: integers, "
                           f"one for each of {count} sequences or for each of their tokens, expected")
    return labels


def padded_right(part):
    """The same sequences with their padding moved to the right end, where it cannot move the positions."""
    import torch
    out = dict(part)
    for side in ("", "decoder_"):
        mask = part.get(side + "attention_mask")
        if mask is None or not bool((mask[:, 0] == 0).any()):
            continue
        shift = (mask != 0).int().argmax(1)
        order = (torch.arange(mask.shape[1], device=mask.device)[None, :] + shift[:, None]) % mask.shape[1]
        moved = [name for name, value in part.items()
                 if value.shape[:2] == mask.shape and (name.startswith("decoder_") == bool(side) or name == LABELS)]
        if [name for name in moved if name != LABELS] == [side + "attention_mask"]:
            raise CaptureError(f"{side}attention_mask begins with zeros, and nothing else has its shape {tuple(mask.shape)}: "
                               "pad on the right")
        for name in moved:
            value = part[name]
            index = order.reshape(order.shape + (1,) * (value.dim() - 2)).expand(value.shape).to(value.device)
            out[name] = value.gather(1, index)
    return out


class quiet:
    """A model in evaluation mode and without a cache; left as it was."""

    def __init__(self, *models):
        self.models = [model for model in models if hasattr(model, "training")]

    def __enter__(self):
        self.training = [(module, module.training) for module in self.models[0].modules()]
        self.models[0].eval()
        configs = [c for c in (getattr(model, "config", None) for model in self.models) if hasattr(c, "use_cache")]
        self.cache = [(config, config.use_cache) for config in configs]
        for config in configs:
            config.use_cache = False

    def __exit__(self, *unused):
        for module, training in self.training:
            module.training = training
        for config, cache in reversed(self.cache):
            config.use_cache = cache


def leading_tokens(model, part, rows):
    """What stands before the patches of an image: "cls, register 1, ..."; empty if the counts do not say so."""
    pixels = part.get("pixel_values")
    patch = getattr(getattr(model, "config", None), "patch_size", None)
    if pixels is None or pixels.dim() != 4 or not isinstance(patch, int):
        return ""
    names = []
    for name, value in model.named_parameters():
        last = name.split(".")[-1]
        if last in ("cls_token", "class_embedding"):
            names.insert(0, "cls")
        elif last == "distillation_token":
            names.append("distillation")
        elif last == "register_tokens" and value.dim() == 3:
            names += [f"register {i}" for i in range(1, value.shape[1] + 1)]
    patches = (pixels.shape[2] // patch) * (pixels.shape[3] // patch)
    return ", ".join(names) if rows.tokens == patches + len(names) else ""


def token_hash(ids):
    """SHA-256 over the token ids, each as an 8-byte little-endian signed integer, special tokens included."""
    return hashlib.sha256(struct.pack(f"<{len(ids)}q", *ids)).hexdigest()


def facts(model, taps_sites, tokens, hidden, dtype, compute, sequences, side, leading):
    """The metadata that every capture has."""
    import torch
    blocks = sum(site.startswith("block.") for site in taps_sites)
    known = {
        "rflow_capture": FORMAT_VERSION,
        "architecture": type(model).__name__,
        "layers": str(blocks),
        "hidden": str(hidden),
        "tokens": str(tokens),
        "sites": SITES + (SITES_NORM if "final_norm" in taps_sites else ""),
        "dtype": dtype,
        "compute_dtype": compute,
        "sequences": str(sequences),
        "captured_with": f"torch {torch.__version__}",
    }
    if "transformers" in sys.modules:
        known["captured_with"] += f", transformers {sys.modules['transformers'].__version__}"
    if side:
        known["side"] = side
    if leading:
        known["leading_tokens"] = leading
    return known


def bytes_of(tensor):
    """A CPU tensor as a little-endian array."""
    import torch
    if tensor.dtype in (torch.bfloat16, torch.float16):
        return tensor.contiguous().view(torch.int16).numpy().astype("<i2", copy=False)
    return tensor.contiguous().numpy().astype("<f4" if tensor.dtype == torch.float32 else "<i8", copy=False)


def write(path, found, model, side, leading, tokenizer, metadata):
    """Write what capture() returns."""
    import torch
    names = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
    sites = [name for name in found if name == "embed" or name.startswith("block.") or name == "final_norm"]
    kind = names.get(found["embed"].dtype)
    if kind is None:
        raise CaptureError(f"sites are {str(found['embed'].dtype)[6:]}: give dtype=\"f32\" to write them")
    mixed = {found[site].dtype for site in sites}
    if len(mixed) > 1:
        raise CaptureError("sites are of several types: give dtype=\"f32\" to write them as one")
    tokens, hidden = found["embed"].shape
    texts = texts_of([found["token_ids"].tolist()], tokenizer) if tokenizer is not None and "token_ids" in found else None
    compute = names.get(next((p.dtype for p in model.parameters()), None), kind)
    known = facts(model, sites, tokens, hidden, kind, compute, len(found["sequences"]) - 1, side, leading)
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    if name:
        known["model"] = os.path.basename(os.path.abspath(name)) if os.path.isdir(name) else name
    if "token_ids" in found:
        known["token_hash"] = token_hash(found["token_ids"].tolist())
    file = PartialFile(os.fspath(path))
    try:
        small = {key: found[key].numpy().astype("<i8", copy=False) for key in ("sequences", "token_ids", "labels") if key in found}
        file.begin(layout(small, texts, {}, sites, STORED[kind], (tokens, hidden)), {**known, **(metadata or {})})
        for key, value in contents(small, texts, {}).items():
            file.put(key, 0, value)
        for site in sites:
            file.put(site, 0, bytes_of(found[site]))
        file.finish()
    finally:
        file.close()


def layout(small, texts, strings, sites, kind, shape):
    """[(name, type, shape)] of the file, the widest types first."""
    tensors = [(name, "I64", (len(value),)) for name, value in small.items()]
    if texts is not None:
        strings = {"tokens": texts, **strings}
    tensors += [(f"{name}_offsets", "I64", (len(offsets),)) for name, (_, offsets) in strings.items()]
    tensors += [(site, kind, shape) for site in sites]
    return tensors + [(name, "U8", (len(text),)) for name, (text, _) in strings.items()]


def contents(small, texts, strings):
    """{name: bytes or array} of what is not a site."""
    if texts is not None:
        strings = {"tokens": texts, **strings}
    out = {name: little(value) for name, value in small.items()}
    out.update({f"{name}_offsets": little(offsets) for name, (_, offsets) in strings.items()})
    out.update({name: text for name, (text, _) in strings.items()})
    return {name: value for name, value in out.items() if len(value)}


def little(values):
    if isinstance(values, array) and sys.byteorder == "big":
        values = array("q", values)
        values.byteswap()
    return values


# ---- on the command line ------------------------------------------------------------------------


class OneLine(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


class Once(argparse.Action):
    def __call__(self, parser, options, value, option=None):
        given = options.__dict__.setdefault("given", set())
        if self.dest in given:
            parser.error(f"{option} is given twice")
        given.add(self.dest)
        setattr(options, self.dest, value)


def parse_arguments(argv):
    parser = OneLine(prog="capture.py", description="Capture a model's hidden states on a text, or on many prompts, "
                                                    "into a safetensors file.")

    def option(group, *names, **how):
        group.add_argument(*names, **({"action": Once} | how))

    source = parser.add_mutually_exclusive_group(required=True)
    option(source, "--model", help="a local directory, or a name on the model hub")
    option(source, "--gguf", metavar="FILE", help="a GGUF file; its weights are dequantised")
    option(parser, "--revision", help="hub revision (branch, tag or commit)")
    option(parser, "--tokenizer", help="tokenizer directory or name, if it is not beside the model")
    option(parser, "--name", help="model name to record (default: the model's path or name)")
    what = parser.add_mutually_exclusive_group(required=True)
    option(what, "--text", metavar="FILE", help="UTF-8 text to run, as one sequence")
    option(what, "--prompts", metavar="FILE", help="many sequences, one a line: JSON (a string, or an object with \"text\" "
           "and, if wanted, \"label\" or \"labels\", \"id\", \"target\"), or plain text in a .txt")
    option(parser, "--batch", type=int, default=16, metavar="N", help="prompts that run together (default 16)")
    option(parser, "--text-title", help="title to record (default: the file's name)")
    option(parser, "--text-origin", default="", help="where the text comes from, to record")
    option(parser, "--max-tokens", type=int, metavar="N", help="use the first N tokens only, of each prompt")
    option(parser, "--no-special-tokens", action="store_true",
           help="do not let the tokenizer add BOS, [CLS], [SEP] and the like")
    option(parser, "--side", choices=["encoder", "decoder"], help="of a model that has both")
    option(parser, "--part", metavar="PATH", help="run this module of the model alone, e.g. text_model")
    option(parser, "--dtype", choices=["bf16", "f16", "f32"], default="bf16", help="stored type (default bf16)")
    option(parser, "--compute", choices=["f32", "bf16", "f16"], default="f32", help="type the model runs in (default f32)")
    option(parser, "--device", default="cpu", help="torch device (default cpu)")
    option(parser, "--blocks", metavar="PATH", help="module path of the list of blocks, e.g. model.layers")
    option(parser, "--final-norm", metavar="PATH",
           help="module path of the final norm, or 'none' (default: the norm that takes in what the last block leaves)")
    option(parser, "--embedding", metavar="PATH",
           help="module whose output is X_0 (default: whatever enters the first block)")
    option(parser, "--restart", action="store_true", help="forget an earlier attempt that was interrupted")
    option(parser, "--output", required=True, metavar="FILE", help="safetensors file to write")
    options = parser.parse_args(argv)
    if options.max_tokens is not None and options.max_tokens < 1:
        parser.error("--max-tokens must be at least 1")
    if options.batch < 1:
        parser.error("--batch must be at least 1")
    if options.gguf and options.revision:
        parser.error("--revision goes with --model")
    return options


def import_torch(options):
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        import torch
        import transformers
        if options.gguf:
            # transformers needs both, and says so less plainly.
            import accelerate  # noqa: F401
            import gguf  # noqa: F401
    except ImportError as error:
        raise CaptureError(f"{one_line(error)}; install what examples/capture/requirements.txt lists")
    transformers.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells every try at the network
    transformers.logging.disable_progress_bar()
    try:
        torch.empty(1, device=options.device)
    except Exception as error:  # of any type, by device
        raise CaptureError(f"cannot use device {options.device}: {one_line(error)}")
    return torch, transformers


def place_of(options):
    """Return where the model is, the arguments that find it there, and its name to record."""
    arguments = {}
    if options.gguf:
        if not os.path.isfile(options.gguf):
            raise CaptureError(f"no such file: {options.gguf}")
        place, arguments["gguf_file"] = os.path.split(os.path.abspath(options.gguf))
        return place, arguments, options.name or arguments["gguf_file"]
    place = options.model
    looks_local = os.path.isabs(place) or place.startswith(".") or place.count("/") > 1
    if looks_local and not os.path.isdir(place):
        raise CaptureError(f"no such model directory: {place}")
    if options.revision:
        arguments["revision"] = options.revision
    return place, arguments, options.name or (os.path.basename(os.path.abspath(place)) if os.path.isdir(place) else place)


def load_tokenizer(options, transformers, place, arguments, name):
    where = options.tokenizer or place
    known = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece", "source")
    if (options.tokenizer or not options.gguf) and os.path.isdir(where) and \
            not any(file.startswith(known) for file in os.listdir(where)):
        # For some families the loader makes an empty one then.
        raise CaptureError(f"no tokenizer in {where}" + ("" if options.tokenizer else ": say with --tokenizer where it is"))
    try:
        return transformers.AutoTokenizer.from_pretrained(where, **({} if options.tokenizer else arguments))
    except Exception as error:  # the loaders raise nearly every built-in type
        raise CaptureError(f"cannot load the tokenizer of {name}: {one_line(error)}")


def load_model(options, torch, transformers, place, arguments, name):
    """Return the model and its revision."""
    compute = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[options.compute]
    try:
        model = transformers.AutoModel.from_pretrained(place, dtype=compute, **arguments)
        model = model.to(options.device)
    except Exception as error:
        raise CaptureError(f"cannot load model {name}: {one_line(error)}")
    revision = None
    if options.gguf:
        revision = "sha256:" + sha256_of_file(options.gguf)
    elif os.path.isdir(place):
        revision = revision_of(place)
    return model.eval(), revision or getattr(model.config, "_commit_hash", None) or options.revision or "local"


def check_lengths(prompts, encoded, model):
    """Refuse what is longer than the model's positions reach."""
    limit = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        # RoBERTa and its kin begin to count behind the padding's index.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None and \
                hasattr(module, "num_embeddings"):
            limit = module.num_embeddings - module.padding_idx - 1
    if not limit:
        return
    for rows in (encoded.features["input_ids"], encoded.ids):
        for prompt, row in zip(prompts, rows):
            if len(row) > limit:
                raise CaptureError(f"{prompt.where}: {len(row)} tokens, and the model takes {limit}: use --max-tokens {limit}")


def batch_of(encoded, indices, pad, torch):
    """The inputs of one batch, padded on the right."""
    inputs = {}
    for name, rows in encoded.features.items():
        width = max(len(rows[i]) for i in indices)
        fill = pad if name.endswith("input_ids") else 0
        inputs[name] = torch.tensor([list(rows[i]) + [fill] * (width - len(rows[i])) for i in indices])
        if name.endswith("input_ids"):
            inputs[name.replace("input_ids", "attention_mask")] = torch.tensor(
                [[1] * len(rows[i]) + [0] * (width - len(rows[i])) for i in indices])
    return inputs


def run(options):
    prompts, raw = read_prompts(options.prompts) if options.prompts else read_text(options.text)
    file = PartialFile(options.output)
    try:
        run_into(file, options, prompts, raw)
    except BaseException as error:
        if isinstance(error, TooLarge):
            file.close(keep=False)
        if isinstance(error, CaptureError):
            raise
        try:
            file.mark(file.done, now=True)  # stopped from outside: another try may go on from here
        except CaptureError:
            pass
        if isinstance(error, KeyboardInterrupt):
            raise CaptureError("interrupted" + file.cure())
        if is_out_of_memory(error):
            smaller = "a smaller --batch" if options.batch > 1 and len(prompts) > 1 else "fewer tokens, --max-tokens"
            raise CaptureError("out of memory" + (file.cure() or f": use {smaller}"))
        if isinstance(error, OSError):
            raise CaptureError(f"{error.filename or options.output}: {error.strerror}" + file.cure())
        raise
    finally:
        file.close()


def run_into(file, options, prompts, raw):
    torch, transformers = import_torch(options)
    place, arguments, name = place_of(options)
    tokenizer = load_tokenizer(options, transformers, place, arguments, name)
    start = None
    if options.side == "decoder":
        try:
            config = transformers.AutoConfig.from_pretrained(place, **arguments)
        except Exception as error:
            raise CaptureError(f"cannot load model {name}: {one_line(error)}")
        if not getattr(config, "is_encoder_decoder", False):
            raise CaptureError(f"{name} has no two sides: leave --side out")
        start = getattr(config, "decoder_start_token_id", None)
        start = config.bos_token_id if start is None else start
        if start is None:
            raise CaptureError(f"{name} does not say what its decoder begins with (decoder_start_token_id)")
    special = not options.no_special_tokens
    encoded = encode(prompts, tokenizer, options.max_tokens, special, start)

    def whole(prompt):
        row = encode([prompt], tokenizer, None, special, start)
        return len(row.ids[0]), sum(row.special[0])

    labels, class_names = labels_of(prompts, encoded, whole)
    model, revision = load_model(options, torch, transformers, place, arguments, name)
    if options.part:
        model = module_at(model, options.part, "--part")
    check_lengths(prompts, encoded, model)
    runner, stack = side_of(model, options.side)
    # Some tokenizers make inputs that their model does not take.
    encoded.features = {key: rows for key, rows in encoded.features.items()
                        if key.endswith("input_ids") or takes(runner, key)}
    taps = Taps(runner, stack, options.blocks, options.final_norm, options.embedding)
    rounding = Rounding(options.dtype)

    offsets = array("q", [0])
    for row in encoded.ids:
        offsets.append(offsets[-1] + len(row))
    tokens = offsets[-1]
    ids = array("q", (id for row in encoded.ids for id in row))
    small = {"sequences": offsets, "token_ids": ids}
    if labels:
        small["labels"] = array("q", (label for row in labels for label in row))
    texts = texts_of(encoded.ids, tokenizer)
    strings = {}
    if any(prompt.id is not None for prompt in prompts):
        names = [(prompt.id or "").encode("utf-8", "replace") for prompt in prompts]
        ends = array("q", [0])
        for one in names:
            ends.append(ends[-1] + len(one))
        strings["prompt_ids"] = (b"".join(names), ends)
    metadata = {
        "model": name,
        "revision": revision,
        "tokenizer": options.tokenizer or name,
        "token_hash": token_hash(ids),
        "text_title": options.text_title or os.path.basename(options.prompts or options.text),
        "text_origin": options.text_origin,
        "text_sha256": hashlib.sha256(raw).hexdigest(),
    }
    if class_names:
        metadata["label_names"] = json.dumps(class_names, ensure_ascii=False)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    side_mask = "decoder_attention_mask" if options.side == "decoder" else "attention_mask"
    masked = takes(runner, side_mask)
    batches = plan(encoded.lengths(), options.batch, padding=masked)

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    file.resume({**metadata, "versions": versions, "batch": str(options.batch), "dtype": options.dtype,
                 "compute": options.compute, "device": options.device, "max_tokens": str(options.max_tokens),
                 "special_tokens": str(special), "side": str(options.side), "part": str(options.part), "blocks": str(options.blocks),
                 "final_norm": str(options.final_norm), "embedding": str(options.embedding),
                 "labels": token_hash(small.get("labels", ()))}, options.restart)
    with quiet(model, runner, stack):
        for number, indices in enumerate(batches):
            # The first batch runs in any case: it finds the norm, and shows that the sites are what they were.
            if 0 < number < file.done:
                continue
            inputs = {key: value.to(options.device) for key, value in batch_of(encoded, indices, pad, torch).items()}
            mask = inputs[side_mask] if masked else inputs.pop(side_mask)
            rows = Rows(len(indices), mask, runner)
            found = taps.run(inputs, rows, rounding)
            if rows.counts != [len(encoded.ids[i]) for i in indices]:
                raise CaptureError(f"the model makes {rows.tokens} rows of {mask.shape[1]} tokens")
            if number == 0:
                hidden = found["embed"].shape[1]
                known = facts(model, taps.sites, tokens, hidden, options.dtype, options.compute, len(prompts), options.side, "")
                file.begin(layout(small, texts, strings, taps.sites, STORED[options.dtype], (tokens, hidden)),
                           {**known, **metadata})
                if file.done:
                    note(f"going on after batch {file.done} of {len(batches)}")
                for key, value in contents(small, texts, strings).items():
                    file.put(key, 0, value)
            for site, kept in found.items():
                data, begin = bytes_of(kept), 0
                for i in indices:
                    file.put(site, offsets[i], data[begin:begin + len(encoded.ids[i])])
                    begin += len(encoded.ids[i])
            file.mark(number + 1)
            progress(number + 1, len(batches))
    file.finish()
    several = f"{len(prompts)} sequences, " if options.prompts else ""
    print(f"{options.output}: {len(taps.sites)} sites, {several}{tokens} tokens, hidden {hidden}, {options.dtype}, "
          f"tokens {metadata['token_hash'][:12]}")


def progress(done, batches):
    if batches > 1 and sys.stderr.isatty():
        print(f"\r{done}/{batches} batches", end="\n" if done == batches else "", file=sys.stderr, flush=True)


def main(argv=None):
    try:
        run(parse_arguments(argv))
    except CaptureError as error:
        print(f"capture.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("capture.py: error: interrupted", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
