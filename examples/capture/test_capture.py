# SPDX-License-Identifier: Apache-2.0
"""Tests of the capture, on small random models built here: python examples/capture/test_capture.py

Needs what requirements.txt lists and no network. With RFLOW_REPORT=path/to/rflow_report, captures are also read by it.
"""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import unittest

FOLDER = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, FOLDER)
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import capture as program  # noqa: E402
import capture_file  # noqa: E402
from capture import capture  # noqa: E402
from capture_errors import CaptureError  # noqa: E402
from capture_prompts import plan  # noqa: E402

WORDS = "[PAD] [UNK] [BOS] [EOS] the a whale sea ship and of in to he it was that his with for".split()
PROMPTS = ["the whale was in the sea", "he", "a ship and a whale", "it was that", "of the sea", "his ship was in it",
           "to the sea with a ship for the whale and that was it", "the the the", "in", "whale whale sea",
           "for it was the sea that he and his ship was in", "and"]
SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": len(WORDS)}
TWO_SIDES = {"d_model": 32, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 2,
             "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": len(WORDS),
             "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2}
IMAGES = {key: value for key, value in SMALL.items() if key != "vocab_size"}

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
place = tempfile.TemporaryDirectory()


def at(name):
    return os.path.join(place.name, name)


def make(config, seed=1):
    torch.manual_seed(seed)
    return transformers.AutoModel.from_config(config).eval()


def tokenizer(special=False):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        words.post_processor = processors.TemplateProcessing(single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 2), ("[EOS]", 3)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]",
                                                bos_token="[BOS]", eos_token="[EOS]")


def save(name, config, special=False):
    make(config).save_pretrained(at(name))
    tokenizer(special).save_pretrained(at(name))
    return at(name)


def written(name, text):
    with open(at(name), "wb") as file:
        file.write(text if isinstance(text, bytes) else text.encode("utf-8"))
    return at(name)


def lines(values):
    return "".join(json.dumps(value) + "\n" for value in values)


def command(*arguments):
    """Run the program here; return its exit status, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = program.main(list(map(str, arguments)))
        except SystemExit as end:
            status = end.code
    return status, out.getvalue(), err.getvalue()


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def site_names(found):
    return [name for name in found if name.startswith(("embed", "block.", "final_norm"))]


def ids_of(text, special=False):
    return tokenizer(special)(text)["input_ids"]


def padded(rows, side, pad=0):
    width = max(map(len, rows))
    fill = [[pad] * (width - len(row)) for row in rows]
    ids = [row + f if side == "right" else f + row for row, f in zip(rows, fill)]
    masks = [[1] * len(row) + [0] * len(f) if side == "right" else [0] * len(f) + [1] * len(row) for row, f in zip(rows, fill)]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(masks)}


class Module(unittest.TestCase):
    def apart(self, one, other):
        """The largest difference of two captures, relative to each site's largest value."""
        self.assertEqual(site_names(one), site_names(other))
        return max(float((one[site].float() - other[site].float()).abs().max() / other[site].float().abs().max())
                   for site in site_names(one))

    def batched_is_single(self, config):
        model = make(config)
        rows = [ids_of(text) for text in PROMPTS]
        alone = [capture(model, {"input_ids": torch.tensor([row])}) for row in rows]
        joined = {site: torch.cat([one[site] for one in alone]) for site in site_names(alone[0])}
        for side in ("right", "left"):
            pad = getattr(config, "pad_token_id", None) or 0
            both = capture(model, padded(rows, side, pad))
            self.assertEqual(both["token_ids"].tolist(), sum(rows, []))
            ends = [0]
            for row in rows:
                ends.append(ends[-1] + len(row))
            self.assertEqual(both["sequences"].tolist(), ends)
            self.assertLess(self.apart(both, joined), 2e-6, (type(config).__name__, side))
        return joined

    def test_batched_equals_one_by_one_with_padding_on_either_side(self):
        t = transformers
        configs = [
            (t.GPTNeoXConfig(**SMALL), True), (t.LlamaConfig(**SMALL), True), (t.BertConfig(**SMALL), False),
            (t.GPT2Config(n_embd=32, n_layer=3, n_head=2, vocab_size=len(WORDS)), True),
            (t.OPTConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, ffn_dim=64, word_embed_proj_dim=32,
                         vocab_size=len(WORDS)), True),
            (t.BloomConfig(hidden_size=32, n_layer=3, n_head=2, vocab_size=len(WORDS)), True),
            (t.RobertaConfig(**SMALL, pad_token_id=1), False), (t.AlbertConfig(**SMALL, embedding_size=32), False),
            (t.MambaConfig(hidden_size=32, num_hidden_layers=3, state_size=8, vocab_size=len(WORDS)), True),
            (t.Mamba2Config(hidden_size=32, num_hidden_layers=3, state_size=8, num_heads=4, head_dim=16, n_groups=1,
                            vocab_size=len(WORDS)), True),
        ]
        for config, norm in configs:
            with self.subTest(type(config).__name__):
                sites = self.batched_is_single(config)
                self.assertEqual(site_names(sites), ["embed", "block.1", "block.2", "block.3"] + ["final_norm"] * norm)

    def test_the_mask_matters(self):
        # Without it, padding changes what an encoder says of the tokens: the test above can fail.
        model = make(transformers.BertConfig(**SMALL))
        rows = [ids_of(text) for text in PROMPTS]
        alone = capture(model, {"input_ids": torch.tensor([rows[1]])})
        without = capture(model, {"input_ids": padded(rows, "right")["input_ids"]})
        width = max(map(len, rows))
        first = {site: without[site][width:width + 1] for site in site_names(alone)}
        self.assertGreater(self.apart(first, alone), 1e-3)

    def test_sites_are_those_of_the_tuple_where_it_has_them(self):
        for config in (transformers.GPTNeoXConfig(**SMALL), transformers.BertConfig(**SMALL)):
            model = make(config)
            inputs = {"input_ids": torch.tensor([ids_of(PROMPTS[0])])}
            found = capture(model, inputs)
            with torch.inference_mode():
                states = model(**inputs, output_hidden_states=True).hidden_states
            for site, state in zip(["embed", "block.1", "block.2"], states):
                self.assertTrue(torch.equal(found[site], state[0]))
            last = "final_norm" if "final_norm" in found else "block.3"
            self.assertTrue(torch.equal(found[last], states[3][0]))
            self.assertEqual("final_norm" in found, type(config).__name__ == "GPTNeoXConfig")

    def test_one_name_before_and_after_the_blocks(self):
        # wav2vec 2.0 has encoder.layer_norm before its blocks, or behind them: only a run can tell.
        for behind in (False, True):
            model = make(transformers.Wav2Vec2Config(
                **SMALL, conv_dim=[16] * 3, conv_stride=[5, 2, 2], conv_kernel=[10, 3, 3], num_feat_extract_layers=3,
                do_stable_layer_norm=behind, feat_extract_norm="layer", num_conv_pos_embeddings=16,
                num_conv_pos_embedding_groups=2))
            torch.manual_seed(3)
            mask = torch.ones(2, 400, dtype=torch.long)
            mask[1, 200:] = 0
            found = capture(model, {"input_values": torch.randn(2, 400), "attention_mask": mask})
            self.assertEqual("final_norm" in found, behind)
            self.assertEqual(found["sequences"].tolist(), [0, 19, 28])

    def test_images(self):
        t = transformers
        for config, tokens, leading in (
                (t.ViTConfig(**IMAGES, image_size=32, patch_size=8), 17, "cls"),
                (t.Dinov2Config(**IMAGES, image_size=28, patch_size=14), 5, "cls"),
                (t.Dinov2WithRegistersConfig(**IMAGES, image_size=28, patch_size=14, num_register_tokens=2), 7,
                 "cls, register 1, register 2")):
            model = make(config)
            torch.manual_seed(4)
            pixels = torch.randn(3, 3, config.image_size, config.image_size)
            found = capture(model, {"pixel_values": pixels}, batch=2, labels=[7, 8, 9], output=at("images.safetensors"))
            self.assertEqual(found["sequences"].tolist(), [0, tokens, 2 * tokens, 3 * tokens])
            self.assertNotIn("token_ids", found)
            self.assertEqual(found["labels"].tolist(), [7] * tokens + [8] * tokens + [9] * tokens)
            self.assertEqual(metadata(at("images.safetensors"))["leading_tokens"], leading)
            with torch.inference_mode():
                self.assertTrue(torch.equal(found["final_norm"][2 * tokens:], model(pixels[2:]).last_hidden_state[0]))

    def test_norm_of_one_token_is_no_site(self):
        # CLIP's vision model normalises the class token only.
        model = make(transformers.CLIPVisionConfig(**IMAGES, image_size=32, patch_size=8))
        self.assertNotIn("final_norm", capture(model, {"pixel_values": torch.zeros(1, 3, 32, 32)}))

    def test_speech(self):
        model = make(transformers.WhisperConfig(**TWO_SIDES, num_mel_bins=16, max_source_positions=50))
        torch.manual_seed(5)
        features = torch.randn(2, 16, 100)
        found = capture(model, {"input_features": features}, side="encoder")
        self.assertEqual(found["sequences"].tolist(), [0, 50, 100])
        with torch.inference_mode():
            self.assertTrue(torch.equal(found["final_norm"].reshape(2, 50, 32), model.encoder(features).last_hidden_state))
        mask = torch.ones(2, 100, dtype=torch.long)
        mask[1, 41:] = 0
        found = capture(model, {"input_features": features, "attention_mask": mask}, side="encoder")
        self.assertEqual(found["sequences"].tolist(), [0, 50, 71])  # two frames a token
        said = torch.tensor([[2, 4, 5, 6], [2, 7, 8, 9]])
        found = capture(model, {"input_features": features, "decoder_input_ids": said}, side="decoder")
        self.assertEqual(found["token_ids"].tolist(), [2, 4, 5, 6, 2, 7, 8, 9])
        self.assertEqual(len(site_names(found)), 4)

    def test_either_side(self):
        t = transformers
        for config, norm in ((t.T5Config(d_model=32, num_layers=3, num_decoder_layers=2, d_kv=16, d_ff=64, num_heads=2,
                                         vocab_size=len(WORDS)), True), (t.BartConfig(**TWO_SIDES), False),
                             (t.MBartConfig(**TWO_SIDES), True)):
            model = make(config)
            source = padded([ids_of(PROMPTS[0]), ids_of(PROMPTS[3])], "left")
            said = padded([ids_of(PROMPTS[4]), ids_of(PROMPTS[9])], "right")
            inputs = {**source, **{f"decoder_{name}": value for name, value in said.items()}}
            for side, blocks, tokens in (("encoder", 3, [6, 3]), ("decoder", 2, [3, 3])):
                found = capture(model, inputs, side=side)
                self.assertEqual(site_names(found),
                                 ["embed"] + [f"block.{i}" for i in range(1, blocks + 1)] + ["final_norm"] * norm)
                self.assertEqual(found["sequences"].tolist(), [0, tokens[0], sum(tokens)])
                single = capture(model, {"input_ids": torch.tensor([ids_of(PROMPTS[3])]),
                                         "decoder_input_ids": torch.tensor([ids_of(PROMPTS[9])])}, side=side)
                second = {site: found[site][tokens[0]:] for site in site_names(found)}
                self.assertLess(self.apart(second, single), 2e-6)
            with self.assertRaisesRegex(CaptureError, "--side encoder or --side decoder"):
                capture(model, inputs)
        with self.assertRaisesRegex(CaptureError, "no two sides"):
            capture(make(t.BertConfig(**SMALL)), source, side="encoder")

    def test_model_is_left_as_it_was(self):
        model = make(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=len(WORDS)))
        model.train()
        model.h[1].eval()
        one = capture(model, padded([[4, 5, 6], [7]], "left"))
        self.assertTrue(model.training and model.h[0].training and not model.h[1].training and model.config.use_cache)
        self.assertFalse(any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()))
        model.eval()
        self.assertEqual(self.apart(one, capture(model, padded([[4, 5, 6], [7]], "left"))), 0)  # no dropout

    def test_batches_types_labels(self):
        model = make(transformers.GPTNeoXConfig(**SMALL))
        inputs = padded([[4, 5, 6], [7], [8, 9]], "left")
        whole = capture(model, inputs, labels=[5, 6, 7])
        self.assertEqual(whole["labels"].tolist(), [5, 5, 5, 6, 7, 7])
        with self.assertRaisesRegex(CaptureError, "labels are for 2 tokens, and the model makes 3"):
            capture(model, inputs, labels=torch.zeros(3, 2, dtype=torch.long))
        per_token = capture(model, inputs, labels=torch.tensor([[1, 2, 3], [0, 0, 4], [0, 5, 6]]), batch=2)
        self.assertEqual(per_token["labels"].tolist(), [1, 2, 3, 4, 5, 6])
        parts = capture(model, [padded([[4, 5, 6], [7]], "right"), padded([[8, 9]], "right")])
        for other in (per_token, parts):
            self.assertLess(self.apart(other, whole), 2e-6)
            self.assertTrue(torch.equal(other["sequences"], whole["sequences"]))
        rounded = capture(model, inputs, dtype="bf16")
        self.assertEqual(rounded["block.1"].dtype, torch.bfloat16)
        self.assertTrue(torch.equal(rounded["block.2"], whole["block.2"].to(torch.bfloat16)))

    def test_written_is_returned(self):
        model = make(transformers.GPTNeoXConfig(**SMALL))
        found = capture(model, padded([[4, 5, 6], [7]], "left"), labels=[1, 0], tokenizer=tokenizer(),
                        output=at("module.safetensors"), metadata={"note": "n"})
        read = load_file(at("module.safetensors"))
        self.assertEqual(set(read), set(found) | {"tokens", "tokens_offsets"})
        self.assertTrue(all(torch.equal(read[name], found[name]) for name in found))
        facts = metadata(at("module.safetensors"))
        self.assertEqual((facts["layers"], facts["tokens"], facts["hidden"], facts["sequences"], facts["note"], facts["dtype"]),
                         ("3", "4", "32", "2", "n", "f32"))
        self.assertEqual([name for name in os.listdir(place.name) if name.startswith("module.")], ["module.safetensors"])

    def test_mistakes(self):
        model = make(transformers.GPTNeoXConfig(**SMALL))
        ids = torch.tensor([[4, 5], [6, 7]])
        for inputs, more, said in (
                ({"input_ids": ids, "attention_mask": torch.tensor([[1, 1], [0, 0]])}, {}, "sequence 1 has no token"),
                (ids, {}, "a mapping of tensors"), ({"input_ids": [[4, 5], [6]]}, {}, "return_tensors"), ({}, {}, "nothing"),
                ({"input_ids": ids, "attention_mask": torch.ones(1, 2)}, {}, "common batch axis"),
                ({"input_ids": ids, "attention_mask": torch.ones(2, 2, 2)}, {}, "expected"),
                ({"input_ids": ids}, {"blocks": "embed_in"}, "not a list"), ({"input_ids": ids}, {"blocks": "none"}, "no module"),
                ({"input_ids": ids}, {"labels": [1]}, "labels are"),
                ({"input_ids": ids + 100}, {}, "forward pass failed"),
                ({"input_ids": ids}, {"output": at("no/such/x")}, "no such directory")):
            with self.subTest(said), self.assertRaisesRegex(CaptureError, said):
                capture(model, inputs, **more)
        swin = transformers.SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
        with self.assertRaisesRegex(CaptureError, "not one residual stream"):
            capture(make(swin), {"pixel_values": torch.zeros(1, 3, 32, 32)})

    def test_an_input_that_the_model_does_not_know_is_told(self):
        err = io.StringIO()
        with contextlib.redirect_stderr(err):
            capture(make(transformers.GPTNeoXConfig(**SMALL)), {"input_ids": torch.tensor([[4]]), "attention_maks": torch.ones(1, 1)})
        self.assertIn("no input called attention_maks", err.getvalue())

    def test_a_chain_that_is_none_is_told(self):
        class Between(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))

            def forward(self, x):
                return self.layers[1](self.layers[0](x) + 1)
        err = io.StringIO()
        with contextlib.redirect_stderr(err):
            capture(Between(), {"x": torch.ones(1, 2, 4)})
        self.assertIn("what enters block.2 is not block.1", err.getvalue())


class CommandLine(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.model = save("neox", transformers.GPTNeoXConfig(**SMALL, max_position_embeddings=64))
        cls.special = save("bert", transformers.BertConfig(**SMALL, max_position_embeddings=64), special=True)
        cls.prompts = written("prompts.jsonl", lines(PROMPTS))

    def run_it(self, *arguments):
        status, out, err = command(*arguments)
        self.assertEqual(status, 0, err)
        return err

    def refused(self, said, *arguments, status=1):
        got, out, err = command(*arguments)
        self.assertEqual((got, out), (status, ""), err)
        self.assertEqual(err.count("\n"), 1, err)
        self.assertRegex(err, said)
        self.assertFalse([name for name in os.listdir(place.name) if name.endswith((".partial", ".journal"))])

    def test_twelve_prompts_are_twelve_runs(self):
        for model, special in ((self.model, False), (self.special, True)):
            self.run_it("--model", model, "--prompts", self.prompts, "--batch", 5, "--dtype", "f32", "--output", at("all.safetensors"))
            found, row = load_file(at("all.safetensors")), 0
            for number, prompt in enumerate(PROMPTS):
                self.run_it("--model", model, "--text", written("one.txt", prompt), "--dtype", "f32", "--output", at("one.safetensors"))
                one = load_file(at("one.safetensors"))
                count = len(one["embed"])
                self.assertEqual(found["sequences"][number], row)
                self.assertEqual(one["sequences"].tolist(), [0, count])
                self.assertEqual(found["token_ids"][row:row + count].tolist(), ids_of(prompt, special))
                for site in site_names(one):
                    self.assertLess(float((found[site][row:row + count] - one[site]).abs().max() / one[site].abs().max()), 2e-6)
                row += count
            self.assertEqual(found["sequences"][-1], row)
            self.assertEqual(len(site_names(found)), 5 if model == self.model else 4)
            ends, text = found["tokens_offsets"].tolist(), bytes(found["tokens"].tolist())
            words = [text[a:b].decode() for a, b in zip(ends, ends[1:])]
            self.assertEqual(words, [WORDS[i] for i in found["token_ids"].tolist()])
            self.assertEqual(metadata(at("all.safetensors"))["sequences"], "12")
        self.read_by_report(at("all.safetensors"), row)

    def read_by_report(self, path, tokens):
        report = os.environ.get("RFLOW_REPORT")
        if not report:
            print("RFLOW_REPORT is not set: the report did not read the capture", file=sys.stderr)
            return
        subprocess.run([report, path, "--shards", "--no-plots", "--force", "-o", at("report")], check=True, stdout=subprocess.DEVNULL)
        with open(os.path.join(at("report"), "metrics.json"), encoding="utf-8") as file:
            model = json.load(file)["models"][0]
        self.assertEqual((model["tokens"]["stored"], model["hidden"], model["blocks"]), (tokens, 32, 3))
        self.assertEqual(model["shards"]["sequences"], len(PROMPTS))

    def test_batch_does_not_change_the_order(self):
        self.order(self.model)

    def test_a_model_without_mask(self):
        # FNet mixes all tokens of a sequence, padding too: only prompts of equal length may run together.
        self.order(save("fnet", transformers.FNetConfig(hidden_size=32, num_hidden_layers=3, intermediate_size=64,
                                                        vocab_size=len(WORDS), max_position_embeddings=64)))

    def order(self, model):
        reference = None
        for batch in (1, 3, 64):
            self.run_it("--model", model, "--prompts", self.prompts, "--batch", batch, "--dtype", "f32",
                        "--output", at("order.safetensors"))
            found = load_file(at("order.safetensors"))
            reference = reference or found
            for name in found:
                difference = (found[name].double() - reference[name].double()).abs().max()
                self.assertLess(float(difference), 2e-6 if name in site_names(found) else 1e-300)

    def test_same_bytes_again(self):
        for name in ("first", "second"):
            self.run_it("--model", self.model, "--prompts", self.prompts, "--batch", 4, "--output", at(name))
        with open(at("first"), "rb") as a, open(at("second"), "rb") as b:
            self.assertEqual(a.read(), b.read())

    def test_labels_and_ids(self):
        prompts = [{"text": "the sea", "label": "b", "id": "x"}, {"text": "he it was", "labels": ["a", None, "b"], "id": 7},
                   "of", {"text": "a ship", "labels": ["c", "a", "a", "b"]}]
        path = written("labels.jsonl", lines(prompts))
        err = self.run_it("--model", self.special, "--prompts", path, "--output", at("labels.safetensors"))
        self.assertEqual(err, "")
        found = load_file(at("labels.safetensors"))
        self.assertEqual(found["labels"].tolist(), [1, 1, 1, 1, -100, 0, -100, 1, -100, -100, -100, -100, 2, 0, 0, 1])
        self.assertEqual(json.loads(metadata(at("labels.safetensors"))["label_names"]), ["a", "b", "c"])
        ends, text = found["prompt_ids_offsets"].tolist(), bytes(found["prompt_ids"].tolist())
        self.assertEqual([text[a:b].decode() for a, b in zip(ends, ends[1:])], ["x", "7", "", ""])
        # Cut short, labels of the text follow their tokens.
        path = written("cut.jsonl", lines([{"text": "a ship was in the sea", "labels": [1, 2, 3, 4, 5, 6]}]))
        self.run_it("--model", self.special, "--prompts", path, "--max-tokens", 5, "--output", at("labels.safetensors"))
        self.assertEqual(load_file(at("labels.safetensors"))["labels"].tolist(), [-100, 1, 2, 3, -100])

    def test_plain_prompts(self):
        path = written("plain.txt", b"\xef\xbb\xbfthe sea\r\n\"he\" was\n\n")  # quotes are text here
        self.run_it("--model", self.model, "--prompts", path, "--output", at("plain.safetensors"))
        self.assertEqual(load_file(at("plain.safetensors"))["sequences"].tolist(), [0, 2, 6])

    def test_unknown_keys_are_a_note(self):
        path = written("unknown.jsonl", lines([{"text": "he", "txt": 1}, {"text": "it", "txt": 2, "more": 3}]))
        err = self.run_it("--model", self.model, "--prompts", path, "--output", at("unknown.safetensors"))
        self.assertRegex(err, "line 1: \"txt\" is not used")
        self.assertRegex(err, "line 2: \"more\" is not used")
        self.assertEqual(err.count("\n"), 2)

    def test_sides(self):
        model = save("t5", transformers.T5Config(d_model=32, num_layers=3, num_decoder_layers=2, d_kv=16, d_ff=64, num_heads=2,
                                                 vocab_size=len(WORDS), decoder_start_token_id=0), special=True)
        path = written("pairs.jsonl", lines([{"text": "the sea", "target": "a whale it"}, {"text": "he was in it", "target": "of"}]))
        self.run_it("--model", model, "--prompts", path, "--side", "decoder", "--output", at("side.safetensors"))
        found = load_file(at("side.safetensors"))
        self.assertEqual(found["token_ids"].tolist(), [0, 2, *ids_of("a whale it"), 0, 2, *ids_of("of")])
        self.assertEqual(len(site_names(found)), 4)
        self.assertEqual(metadata(at("side.safetensors"))["side"], "decoder")
        err = self.run_it("--model", model, "--prompts", path, "--side", "encoder", "--output", at("side.safetensors"))
        self.assertEqual(load_file(at("side.safetensors"))["sequences"].tolist(), [0, 4, 10])
        self.assertIn("is used with --side decoder only", err)
        self.refused("no two sides", "--model", self.model, "--prompts", path, "--side", "decoder", "--output", at("x"))
        self.refused("line 1: --side decoder needs a \"target\"", "--model", model, "--prompts", self.prompts,
                     "--side", "decoder", "--output", at("x"))
        self.refused("say --side encoder or --side decoder", "--model", model, "--prompts", self.prompts, "--output", at("x"))

    def test_mistakes_are_one_line(self):
        model = ("--model", self.model)
        text = written("good.txt", "the sea\n")
        many = written("many.txt", "sea " * 70)
        bare = at("bare")
        make(transformers.GPTNeoXConfig(**SMALL)).save_pretrained(bare)
        for said, status, *arguments in (
                ("No such file", 1, *model, "--prompts", at("none.jsonl")),
                ("line 2 is not JSON", 1, *model, "--prompts", written("bad.jsonl", "\"a\"\n{\"text\": \n\"b\"\n")),
                ("line 1 is not JSON.*ends in .txt", 1, *model, "--prompts", written("plain.jsonl", "the sea\n")),
                ("line 2: an empty prompt", 1, *model, "--prompts", written("empty.jsonl", "\"a\"\n\" \"\n")),
                ("line 2: an empty prompt", 1, *model, "--prompts", written("empty.txt", "a\n\nb\n")),
                ("holds no prompt", 1, *model, "--prompts", written("nothing.jsonl", "\n\n")),
                ("line 1: no \"text\"", 1, *model, "--prompts", written("key.jsonl", "{\"txt\": \"a\"}\n")),
                ("line 1: a string or an object", 1, *model, "--prompts", written("list.jsonl", "[\"a\"]\n")),
                ("line 1: \"text\" is the number 3", 1, *model, "--prompts", written("number.jsonl", "{\"text\": 3}\n")),
                ("line 1: a label is an object", 1, *model, "--prompts", written("label.jsonl", "{\"text\": \"a\", \"label\": {}}\n")),
                ("line 1: 3 labels for 1 tokens", 1, *model, "--prompts", written("labels.jsonl", "{\"text\": \"a\", \"labels\": [1,2,3]}\n")),
                ("line 2: a label is text, and on .* line 1", 1, *model, "--prompts",
                 written("mixed.jsonl", "{\"text\": \"a\", \"label\": 1}\n{\"text\": \"a\", \"label\": \"b\"}\n")),
                ("line 1: half of a surrogate pair", 1, *model, "--prompts", written("half.jsonl", "\"\\ud800\"\n")),
                ("is not UTF-8 .line 2", 1, *model, "--prompts", written("latin.jsonl", b"\"a\"\n\"\xe9\"\n")),
                ("No such file", 1, *model, "--text", at("none.txt")),
                ("no such model directory", 1, "--model", at("nowhere"), "--text", text),
                ("cannot load .*nobody/nothing", 1, "--model", "nobody/nothing", "--text", text),
                ("cannot use device cuda:77", 1, *model, "--text", text, "--device", "cuda:77"),
                ("cannot use device gpu", 1, *model, "--text", text, "--device", "gpu"),
                ("no tokenizer in .*: say with --tokenizer", 1, "--model", bare, "--text", text),
                ("no tokenizer in ", 1, "--model", bare, "--tokenizer", bare, "--text", text),
                ("no module wrong", 1, *model, "--text", text, "--blocks", "wrong"),
                ("no module wrong", 1, *model, "--text", text, "--final-norm", "wrong"),
                ("70 tokens, and the model takes 64: use --max-tokens 64", 1, *model, "--text", many),
                ("--text is given twice", 2, *model, "--text", text, "--text", text),
                ("--prompts: not allowed with", 2, *model, "--text", text, "--prompts", text),
                ("--batch must be", 2, *model, "--text", text, "--batch", "0")):
            with self.subTest(said):
                self.refused(said, *arguments, "--output", at("x"), status=status)
                self.assertFalse(os.path.exists(at("x")))
        self.refused("is a directory", *model, "--text", text, "--output", place.name)
        self.refused("no such directory", *model, "--text", text, "--output", at("no/such/x"))
        # The cure that a message names works.
        self.run_it(*model, "--text", many, "--max-tokens", 64, "--output", at("cut.safetensors"))
        self.run_it("--model", bare, "--tokenizer", self.model, "--text", text, "--output", at("bare.safetensors"))
        roberta = save("roberta", transformers.RobertaConfig(**SMALL, pad_token_id=1, max_position_embeddings=34))
        self.refused("takes 32: use --max-tokens 32", "--model", roberta, "--text", many, "--output", at("x"))
        self.run_it("--model", roberta, "--text", many, "--max-tokens", 32, "--output", at("cut.safetensors"))

    def test_a_model_with_two_towers(self):
        shape = {**SMALL, "max_position_embeddings": 32, "eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 0}
        model = save("clip", transformers.CLIPConfig(text_config=shape, vision_config={**IMAGES, "image_size": 32, "patch_size": 8}))
        text = written("good.txt", "the sea\n")
        self.refused("several lists of blocks.*--part", "--model", model, "--text", text, "--output", at("x"))
        self.run_it("--model", model, "--text", text, "--part", "text_model", "--output", at("tower.safetensors"))
        self.assertEqual(len(site_names(load_file(at("tower.safetensors")))), 5)

    def test_too_large_for_f16(self):
        model = make(transformers.GPTNeoXConfig(**SMALL))
        with torch.no_grad():
            model.embed_in.weight *= 1e9
        model.save_pretrained(at("large"))
        tokenizer().save_pretrained(at("large"))
        self.refused("too large for f16", "--model", at("large"), "--prompts", self.prompts, "--dtype", "f16", "--output", at("x"))
        self.run_it("--model", at("large"), "--prompts", self.prompts, "--dtype", "bf16", "--output", at("large.safetensors"))


# Runs the program with a stop after so many batches; the journal is written after each.
STOPPED = """
import os, signal, sys
sys.path.insert(0, {folder!r})
import capture_file
capture_file.SECONDS_BETWEEN_MARKS = 0
mark, seen = capture_file.PartialFile.mark, []
def stop(self, batches, now=False):
    mark(self, batches, now)
    if not now:
        seen.append(batches)
    if len(seen) == {after} and not now:
        {how}
capture_file.PartialFile.mark = stop
import capture
sys.exit(capture.main(sys.argv[1:]))
"""


class Interrupted(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.model = save("neox", transformers.GPTNeoXConfig(**SMALL, max_position_embeddings=64))
        cls.prompts = written("prompts.jsonl", lines(PROMPTS))
        cls.arguments = ["--model", cls.model, "--prompts", cls.prompts, "--batch", "2"]
        status, out, err = command(*cls.arguments, "--output", at("whole"))
        assert status == 0, err

    def stopped(self, how, after, *arguments, limit=None):
        code = STOPPED.format(folder=FOLDER, after=after, how=how)
        return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, preexec_fn=limit)

    def same(self, name):
        with open(at("whole"), "rb") as a, open(at(name), "rb") as b:
            self.assertEqual(a.read(), b.read())
        self.assertFalse([other for other in os.listdir(place.name) if other.startswith(name + ".")])

    def test_killed_and_run_again(self):
        arguments = [*self.arguments, "--output", at("killed")]
        for after in (1, 3, 2):
            end = self.stopped("os.kill(os.getpid(), signal.SIGKILL)", after, *arguments)
            self.assertEqual(end.returncode, -signal.SIGKILL)
            self.assertFalse(os.path.exists(at("killed")))
        with open(at("killed.journal"), encoding="utf-8") as file:
            self.assertEqual(json.load(file)["batches"], 4)  # the first again each time, and the next ones
        self.assertRegex(command(*self.arguments, "--dtype", "f32", "--output", at("killed"))[2],
                         "begun with another dtype .bf16, now f32.*--restart")
        self.assertRegex(command("--model", self.model, "--prompts", self.prompts, "--batch", "3", "--output", at("killed"))[2],
                         "begun with another batch")
        status, out, err = command(*arguments)
        self.assertEqual((status, err), (0, "capture.py: note: going on after batch 4 of 6\n"))
        self.same("killed")

    def test_restart(self):
        self.stopped("os.kill(os.getpid(), signal.SIGKILL)", 2, *self.arguments, "--dtype", "f32", "--output", at("restarted"))
        self.assertEqual(command(*self.arguments, "--output", at("restarted"))[0], 1)
        self.assertEqual(command(*self.arguments, "--restart", "--output", at("restarted"))[::2], (0, ""))
        self.same("restarted")

    def test_interrupted(self):
        end = self.stopped("os.kill(os.getpid(), signal.SIGINT)", 3, *self.arguments, "--output", at("asked"))
        self.assertEqual(end.returncode, 1)
        self.assertEqual(end.stderr, "capture.py: error: interrupted (3 batches are done: the same command goes on from there)\n")
        self.assertEqual(command(*self.arguments, "--output", at("asked"))[0], 0)
        self.same("asked")

    def test_killed_before_the_first_batch(self):
        written("early.partial", b"")
        self.assertEqual(command(*self.arguments, "--output", at("early"))[0], 0)
        self.same("early")

    def test_another_model_or_a_torn_file(self):
        self.stopped("os.kill(os.getpid(), signal.SIGKILL)", 2, *self.arguments, "--output", at("torn"))
        other = make(transformers.GPTNeoXConfig(**SMALL, max_position_embeddings=64), seed=9)
        os.makedirs(at("other/neox"), exist_ok=True)
        other.save_pretrained(at("other/neox"))
        tokenizer().save_pretrained(at("other/neox"))
        status, out, err = command("--model", at("other/neox"), *self.arguments[2:], "--output", at("torn"))
        self.assertEqual(status, 1)
        self.assertIn("begun with another revision", err)
        os.truncate(at("torn.partial"), 1000)
        status, out, err = command(*self.arguments, "--output", at("torn"))
        self.assertIn("beginning again", err)
        self.same("torn")

    def test_a_cure_by_other_arguments_can_be_followed(self):
        end = self.stopped("from capture_errors import TooLarge; raise TooLarge('use another type')", 3,
                           *self.arguments, "--dtype", "f16", "--output", at("cured"))
        self.assertEqual((end.returncode, end.stderr), (1, "capture.py: error: use another type\n"))
        self.assertEqual(command(*self.arguments, "--output", at("cured"))[::2], (0, ""))
        self.same("cured")

    def test_a_mistake_leaves_an_earlier_attempt(self):
        arguments = [*self.arguments, "--output", at("left")]
        self.stopped("os.kill(os.getpid(), signal.SIGKILL)", 3, *arguments)
        self.assertEqual(command(*arguments, "--blocks", "wrong")[0], 1)
        self.assertEqual(command(*arguments, "--tokenizer", at("nowhere/at/all"))[0], 1)
        self.assertEqual(command(*arguments)[2], "capture.py: note: going on after batch 3 of 6\n")
        self.same("left")

    def test_two_at_once(self):
        holder = capture_file.PartialFile(at("held"))
        try:
            self.assertRegex(command(*self.arguments, "--output", at("held"))[2], "another capture is writing")
        finally:
            holder.close()
        self.assertFalse(os.path.exists(at("held.partial")))

    def test_disk_full(self):
        import resource
        whole = os.path.getsize(at("whole"))
        end = self.stopped("pass", 99, *self.arguments, "--output", at("full"),
                           limit=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (whole // 2, whole // 2)))
        self.assertEqual((end.returncode, end.stderr.count("\n")), (1, 1), end.stderr)
        self.assertRegex(end.stderr, f"cannot write .*full: .*{whole} bytes")
        self.assertFalse([name for name in os.listdir(place.name) if name.startswith("full")])

    def test_out_of_memory(self):
        end = self.stopped("raise MemoryError()", 1, *self.arguments, "--output", at("memory"))
        self.assertEqual((end.returncode, end.stderr),
                         (1, "capture.py: error: out of memory (1 batches are done: the same command goes on from there)\n"))
        self.assertEqual(command(*self.arguments, "--output", at("memory"))[0], 0)
        self.same("memory")


class Planning(unittest.TestCase):
    def test_every_sequence_once_and_the_largest_batch_first(self):
        import random
        for seed in range(200):
            draw = random.Random(seed)
            lengths = [draw.randint(1, 50) for _ in range(draw.randint(1, 300))]
            batch, window = draw.randint(1, 20), draw.randint(1, 5)
            batches = plan(lengths, batch, window)
            self.assertEqual(sorted(sum(plan(lengths, batch, window, padding=False), [])), list(range(len(lengths))), seed)
            for one in plan(lengths, batch, window, padding=False):
                self.assertEqual(len({lengths[i] for i in one}), 1, seed)
                self.assertLessEqual(len(one), batch)
            self.assertEqual(sorted(sum(batches, [])), list(range(len(lengths))), seed)
            cost = [max(lengths[i] for i in one) * len(one) for one in batches]
            self.assertEqual(cost[0], max(cost), seed)
            self.assertLessEqual(max(map(len, batches)), batch)


if __name__ == "__main__":
    unittest.main()
