# SPDX-License-Identifier: Apache-2.0
"""Where the sites of a model are, and one forward pass that takes them.

Sites are read by forward hooks and not from the `hidden_states` tuple, because that tuple means something
else in every family: some drop the embedding, some put the final norm in place of the last block.
"""

import hashlib
import inspect
import os

from capture_errors import CaptureError, TooLarge, is_out_of_memory, note, one_line, warn

# What families call their list of blocks: layers (Llama, GPT-NeoX, Mamba, ViT, Whisper), layer (BERT, DINOv2),
# h (GPT-2, Falcon), block (T5), blocks (MPT), albert_layer_groups.
NAMES_OF_BLOCKS = ("layers", "layer", "h", "block", "blocks", "albert_layer_groups")


def submodule(model, path):
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def children(model):
    return ", ".join(name for name, _ in model.named_children()) or "no modules"


def module_at(model, path, asked):
    found = submodule(model, path)
    if found is None:
        raise CaptureError(f"{asked}: {type(model).__name__} has no module {path}; it has {children(model)}")
    return found


def side_of(model, side):
    """Return the module to run and the one that holds the blocks, of a model with one or two sides."""
    name = type(model).__name__
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        if side is not None:
            raise CaptureError(f"{name} has no two sides: leave --side out")
        return model, model
    if side is None:
        raise CaptureError(f"{name} has an encoder and a decoder, two chains: say --side encoder or --side decoder")
    try:
        return (model.get_encoder(), model.get_encoder()) if side == "encoder" else (model, model.get_decoder())
    except (AttributeError, NotImplementedError):
        raise CaptureError(f"{name} does not say which of its modules is the {side}")


def blocks_of(stack, path):
    """The list of blocks, by the caller's path or by its name."""
    from torch import nn
    lists = (nn.ModuleList, nn.Sequential)
    if path:
        blocks = module_at(stack, path, "--blocks")
        if not isinstance(blocks, lists) or len(blocks) == 0:
            raise CaptureError(f"--blocks: {path} is a {type(blocks).__name__}, not a list of blocks")
        return list(blocks)
    found = []
    for name, module in stack.named_modules():
        inside = any(name.startswith(other + ".") for other, _ in found)
        if isinstance(module, lists) and len(module) > 0 and not inside and name.split(".")[-1] in NAMES_OF_BLOCKS:
            found.append((name, module))
    if len(found) == 1:
        return list(found[0][1])
    if found:
        raise CaptureError(f"{type(stack).__name__} has several lists of blocks, {', '.join(name for name, _ in found)}: "
                           "say which with --blocks, or run one part of the model alone with --part")
    raise CaptureError(f"{type(stack).__name__} has no list of blocks known here: give --blocks PATH; it has {children(stack)}")


def takes(runner, name):
    """Whether forward has a parameter of that name. Many models swallow any other without a word."""
    parameters = inspect.signature(runner.forward).parameters.values()
    return any(p.name == name for p in parameters) or all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


class Rows:
    """Which rows of a (batch, tokens, hidden) tensor are tokens, in one forward pass."""

    def __init__(self, batch, mask, runner):
        """mask  (batch, m) tensor, zero where there is padding, or None; m is the tokens, or the frames that
        a speech model makes tokens of."""
        self.batch, self.mask, self.runner = batch, mask, runner
        self.tokens = self.index = self.counts = None

    def look(self, tokens):
        import torch
        self.tokens = tokens
        if self.mask is None:
            self.counts = [tokens] * self.batch
            return
        mask = self.mask != 0
        if mask.shape[1] != tokens:
            lengths = getattr(self.runner, "_get_feat_extract_output_lengths", None)
            if lengths is None:
                raise CaptureError(f"attention_mask is for {mask.shape[1]} tokens, and the model makes {tokens}")
            counts = lengths(mask.sum(-1)).long().clamp(max=tokens)
            mask = torch.arange(tokens, device=mask.device)[None, :] < counts[:, None]
        self.counts = mask.sum(-1).tolist()
        if not bool(mask.all()):
            self.index = mask.reshape(-1).nonzero().squeeze(1)

    def take(self, value, site):
        """The tokens of a module's value, one after the other: (kept, hidden)."""
        import torch
        # Blocks return a tensor in some families and versions, a tuple led by it in others.
        if isinstance(value, (tuple, list)) and value:
            value = value[0]
        if not torch.is_tensor(value) or value.dim() != 3 or value.shape[0] != self.batch:
            what = tuple(value.shape) if torch.is_tensor(value) else type(value).__name__
            raise CaptureError(f"{site}: expected a ({self.batch}, tokens, hidden) tensor, got {what}")
        if self.tokens is None:
            self.look(value.shape[1])
        if value.shape[1] != self.tokens:
            raise CaptureError(f"{site} has {value.shape[1]} tokens where the site before has {self.tokens}: not one residual stream")
        flat = value.detach().reshape(-1, value.shape[2])
        return flat if self.index is None else flat.index_select(0, self.index.to(flat.device))


class Taps:
    """The sites of one model: `sites` names them, after the first run."""

    def __init__(self, runner, stack, blocks=None, final_norm=None, embedding=None):
        """runner      module that is called
        stack       module in or below it that holds the blocks
        blocks      module path in stack of the list of blocks; default: the one list that is called so
        final_norm  module path in stack, or "none"; default: the norm that takes in what the last block leaves
        embedding   module path in stack whose output is X_0; default: what enters the first block
        """
        self.runner, self.stack = runner, stack
        self.blocks = blocks_of(stack, blocks)
        self.embedding = module_at(stack, embedding, "--embedding") if embedding else None
        self.search = final_norm is None
        self.norm = None
        if final_norm not in (None, "none"):
            self.norm = module_at(stack, final_norm, "--final-norm")
        self.sites = None

    def run(self, inputs, rows, store):
        """One forward pass under the hooks; return {site: store(site, (kept, hidden) tensor)} in order.

        inputs  {name: tensor}
        rows    Rows of this batch
        store   called once a site, as soon as it is there
        The first run looks for the final norm, and warns where the sites do not form a chain.
        Raises CaptureError if a site does not run once, or is not of one residual stream.
        """
        import torch
        first = self.sites is None
        for name in inputs:
            if first and not takes(self.runner, name):
                note(f"{type(self.runner).__name__} has no input called {name}")
        taken, handles, last = {}, [], [None, None]  # last: the site before and its rows, in the first run
        width = []

        def equal(a, b):
            return a.shape == b.shape and torch.equal(a.to(b.dtype), b)

        def keep(site, value):
            if site in taken:
                raise CaptureError(f"{site} ran twice in one pass")
            if site != "final_norm" and "final_norm" in taken:
                raise CaptureError(f"{site} ran after the final norm: say with --final-norm which one it is, or 'none'")
            kept = rows.take(value, site)
            width.append(kept.shape[1])
            if width[-1] != width[0]:
                raise CaptureError(f"{site} is {width[-1]} wide, and the site before {width[0]}: not one residual stream")
            if first:
                last[:] = [site, kept.clone()]  # a copy: later code may add to the same storage in place
            taken[site] = store(site, kept)

        def follows(site, value):
            """Warn if what enters a module is not what the site before left."""
            if first and last[1] is not None and not equal(last[1], rows.take(value, f"input of {site}")):
                warn(f"what enters {site} is not {last[0]}: something between them changes the representation")

        def argument(arguments, named):
            if arguments:
                return arguments[0]
            return named.get("hidden_states", next((x for x in named.values() if torch.is_tensor(x) and x.dim() == 3), None))

        # Blocks are numbered as they run: families that share their weights run one module again and again.
        number = [0]

        def block_enters(module, arguments, named):
            value = argument(arguments, named)
            number[0] += 1
            if number[0] == 1 and self.embedding is None:
                keep("embed", value)
            else:
                follows(f"block.{number[0]}", value)

        def block_leaves(module, arguments, output):
            keep(f"block.{number[0]}", output)

        def looks_like_the_norm(module, arguments, named, output):
            # Called for every norm outside the blocks; the final one takes in all that the last block left.
            if self.norm is not None or number[0] < len(self.blocks):
                return
            value = argument(arguments, named)
            if torch.is_tensor(value) and torch.is_tensor(output) and value.dim() == 3 and value.shape == output.shape and \
                    value.shape[:2] == (rows.batch, rows.tokens) and equal(last[1], rows.take(value, "final_norm")):
                self.norm = module
                keep("final_norm", output)

        if self.embedding is not None:
            handles.append(self.embedding.register_forward_hook(lambda module, arguments, output: keep("embed", output)))
        for block in self.blocks:
            handles.append(block.register_forward_pre_hook(block_enters, with_kwargs=True))
            handles.append(block.register_forward_hook(block_leaves))
        if self.norm is not None:
            handles.append(self.norm.register_forward_pre_hook(
                lambda module, arguments, named: follows("final_norm", argument(arguments, named)), with_kwargs=True))
            handles.append(self.norm.register_forward_hook(lambda module, arguments, output: keep("final_norm", output)))
        elif first and self.search:
            inside = {id(module) for block in self.blocks for module in block.modules()}
            for module in self.stack.modules():
                if id(module) not in inside and "norm" in type(module).__name__.lower():
                    handles.append(module.register_forward_hook(looks_like_the_norm, with_kwargs=True))
        try:
            with torch.inference_mode():
                output = self.runner(**inputs)
        except CaptureError:
            raise
        except Exception as error:  # models raise nearly every built-in type
            if is_out_of_memory(error):
                raise
            raise CaptureError(f"the forward pass failed: {one_line(error)}")
        finally:
            for handle in handles:
                handle.remove()

        sites = ["embed"] + [f"block.{i}" for i in range(1, max(len(self.blocks), number[0]) + 1)]
        sites += ["final_norm"] if self.norm is not None else []
        missing = [site for site in self.sites or sites if site not in taken]
        if missing:
            raise CaptureError(f"{missing[0]} never ran ({len(missing)} of {len(sites)} sites missing)")
        if self.sites is not None and sites != self.sites:
            raise CaptureError(f"{len(sites)} sites, and {len(self.sites)} in the batch before")
        if first:
            returned = getattr(output, "last_hidden_state", None)
            if torch.is_tensor(returned) and returned.dim() == 3 and returned.shape[:2] == (rows.batch, rows.tokens) and \
                    not equal(last[1], rows.take(returned, "the output")):
                warn(f"what the model returns is not {sites[-1]}: something after it changes the representation"
                     + ("; --final-norm PATH names a norm" if self.search and self.norm is None else ""))
        self.sites = sites
        return {site: taken[site] for site in sites}


class Rounding:
    """Rounds rows to the stored type, on the CPU; says once where a value is not finite."""

    def __init__(self, dtype):
        """dtype  "bf16", "f16", "f32", or None for the type that the model computes in"""
        self.dtype, self.told = dtype, False

    def __call__(self, site, rows):
        import torch
        target = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, None: rows.dtype}[self.dtype]
        rounded = rows.to(target)
        if rounded.data_ptr() == rows.data_ptr():
            rounded = rounded.clone()  # later code may add to the same storage in place
        if not bool(torch.isfinite(rounded).all()):
            bad = ~torch.isfinite(rows)
            if not bool(bad.any()):
                raise TooLarge(f"{site} reaches {float(rows.abs().max()):.6g}, too large for {self.dtype}: "
                               "use --dtype bf16 or f32")
            if not self.told:
                token, feature = (int(i) for i in bad.nonzero()[0])
                warn(f"{site} has a NaN or an infinity at token {token} of its batch, feature {feature}")
            self.told = True
        return rounded.cpu()


def sha256_of_file(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def revision_of(folder):
    """SHA-256 of a folder's weights, or None if it has none: of the file, or of the list of several files' digests."""
    names = sorted(name for name in os.listdir(folder)
                   if name.endswith((".safetensors", ".bin")) and name.startswith(("model", "pytorch_model")))
    if "model.safetensors" in names:
        names = ["model.safetensors"]
    elif any(name.endswith(".safetensors") for name in names):
        names = [name for name in names if name.endswith(".safetensors")]
    digests = [sha256_of_file(os.path.join(folder, name)) for name in names]
    if len(digests) > 1:
        lines = "".join(f"{digest}  {name}\n" for digest, name in zip(digests, names))
        return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()
    return f"sha256:{digests[0]}" if digests else None
