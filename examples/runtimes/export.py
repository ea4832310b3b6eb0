#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Export a Hugging Face model for the examples on runtimes, and the token ids of a text beside it.

    export.py --to torchscript --gguf q4.gguf --text chapter.txt --output model.pt
    export.py --to openvino    --model ./dir  --text chapter.txt --output model.xml
    export.py --to onnx        --model ./dir  --text chapter.txt --output model.onnx

The other options are those of ../capture/capture.py, whose captures the examples compare with. TorchScript
modules return embedding and blocks as a tuple. OpenVINO and ONNX models return their last state only: the
sites are intermediate tensors, which the C++ example makes outputs (OpenVINO) or this script does (ONNX).
The ids go to OUTPUT.ids.txt.
"""

import os
import re
import sys
import warnings

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(here, "..", "capture"))
import capture  # noqa: E402


def hidden_states_module(torch, model, blocks, final_only):
    class Exported(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            kept = []
            keep_input = lambda m, args, named: kept.append(args[0] if args else named["hidden_states"])
            keep = lambda m, args, out: kept.append(out[0] if isinstance(out, tuple) else out)
            hooks = [blocks[0].register_forward_pre_hook(keep_input, with_kwargs=True)]
            hooks += [block.register_forward_hook(keep) for block in blocks]
            # A mask of ones, or transformers looks for packed sequences with what exporters do not know.
            last = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
            for hook in hooks:
                hook.remove()
            return last if final_only else tuple(kept)

    return Exported().eval()


def add_outputs(path, wanted):
    """Makes intermediate tensors of an ONNX model outputs, after those it has, in their order there."""
    import onnx
    model = onnx.load(path)
    float32 = onnx.TensorProto.FLOAT
    for name in wanted:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, float32, None))
    onnx.save(model, path)


def residual_stream(path, block_count):
    """Names of what enters the first block and of what leaves each, in an ONNX model."""
    import onnx
    graph = onnx.load(path, load_external_data=False).graph
    last = {}
    for node in graph.node:
        addition = re.fullmatch(r".*/layers\.(\d+)/Add(_\d+)?", node.name)
        if addition:
            last[int(addition[1])] = node.output[0]  # a block's last addition directly in it
    first = next(node for node in graph.node if node.op_type == "Gather" and "embed" in node.name)
    if len(last) != block_count:
        raise SystemExit(f"export.py: error: {len(last)} of {block_count} blocks found in the graph")
    return [first.output[0]] + [last[i] for i in range(block_count)]


def main():
    arguments = sys.argv[1:]
    if "--to" not in arguments or arguments.index("--to") + 1 == len(arguments):
        raise SystemExit(__doc__)
    at = arguments.index("--to")
    target = arguments[at + 1]
    if target not in ("torchscript", "openvino", "onnx"):
        raise SystemExit(f"export.py: error: --to {target}: torchscript, openvino or onnx expected")
    options = capture.parse_arguments(arguments[:at] + arguments[at + 2:])
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TQDM_DISABLE", "1")
    import torch
    import transformers
    text = capture.read_text(options.text)
    model, tokenizer, _, _ = capture.load(options, torch, transformers)
    model.set_attn_implementation("eager")
    blocks, _ = capture.locate(model, options, torch)
    ids = capture.tokenize(tokenizer, text, options, None)["input_ids"]
    module = hidden_states_module(torch, model, blocks, final_only=target != "torchscript")

    with torch.no_grad():
        if target == "torchscript":
            torch.jit.trace(module, (ids,), check_trace=False).save(options.output)
        elif target == "openvino":
            import openvino
            openvino.save_model(openvino.convert_model(module, example_input=(ids,)), options.output,
                                compress_to_fp16=False)
        else:
            torch.onnx.export(module, (ids,), options.output, dynamo=False, input_names=["ids"],
                              output_names=["last"], dynamic_axes={"ids": {1: "tokens"}},
                              do_constant_folding=False)
            add_outputs(options.output, residual_stream(options.output, len(blocks)))
    with open(options.output + ".ids.txt", "w") as file:
        file.write(" ".join(map(str, ids[0].tolist())) + "\n")
    print(f"{options.output}: {len(blocks)} blocks, {ids.shape[1]} tokens")


if __name__ == "__main__":
    try:
        main()
    except capture.UserError as error:
        raise SystemExit(f"export.py: error: {error}")
