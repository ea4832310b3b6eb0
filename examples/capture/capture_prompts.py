# SPDX-License-Identifier: Apache-2.0
"""Prompts from a file, their tokens, and in which batches they run."""

import json
from array import array

from capture_errors import CaptureError, note, one_line

IGNORED = -100  # the label of a token that has none


class Prompt:
    """One sequence: text, what the decoder of a two-sided model is to say, a label or labels, an id."""

    def __init__(self, where, text, target=None, label=None, id=None):
        self.where, self.text, self.target, self.label, self.id = where, text, target, label, id


def read_bytes(path):
    try:
        with open(path, "rb") as file:
            raw = file.read()
    except OSError as error:
        raise CaptureError(f"cannot read {path}: {error.strerror}")
    try:
        # Some editors begin UTF-8 with a mark; it is not part of the text.
        return raw, raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise CaptureError(f"{path} is not UTF-8 (line {line}, byte {error.start})")


def read_text(path):
    """A file as one prompt; return [Prompt] and its bytes."""
    text = read_bytes(path)[1].strip()  # editors end a file with a newline; it is not part of the text
    if not text:
        raise CaptureError(f"{path} holds no text")
    return [Prompt(path, text)], text.encode("utf-8")


def read_prompts(path):
    """One prompt a line: plain text in a .txt, else JSON (a string, or an object with "text"); return [Prompt] and bytes."""
    raw, text = read_bytes(path)
    lines = text.split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise CaptureError(f"{path} holds no prompt")
    prompts, unknown = [], {}
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        line = line.rstrip("\r")
        if path.endswith(".txt"):
            prompt = Prompt(where, line)
        elif not line.strip():
            continue
        else:
            prompt = prompt_of_json(where, line, unknown)
        if not prompt.text.strip():
            raise CaptureError(f"{where}: an empty prompt")
        try:
            prompt.text.encode("utf-8")
        except UnicodeEncodeError:
            raise CaptureError(f"{where}: half of a surrogate pair, which is no character")
        prompts.append(prompt)
    for key, where in unknown.items():
        note(f"{where}: \"{key}\" is not used; text, label, labels, id and target are")
    return prompts, raw


def prompt_of_json(where, line, unknown):
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CaptureError(f"{where} is not JSON: {one_line(error)} (a file of plain prompts, one a line, ends in .txt)")
    if isinstance(value, str):
        return Prompt(where, value)
    if not isinstance(value, dict):
        raise CaptureError(f"{where}: a string or an object expected, found {json_name(value)}")
    if "text" not in value:
        raise CaptureError(f"{where}: no \"text\" in the object")
    for key in ("text", "target"):
        if key in value and not isinstance(value[key], str):
            raise CaptureError(f"{where}: \"{key}\" is {json_name(value[key])}, not a string")
    if "label" in value and "labels" in value:
        raise CaptureError(f"{where}: both \"label\" and \"labels\"")
    id = value.get("id")
    if id is not None and (isinstance(id, bool) or not isinstance(id, (str, int))):
        raise CaptureError(f"{where}: \"id\" is {json_name(id)}, not a string or an integer")
    for key in value:
        if key not in ("text", "target", "label", "labels", "id"):
            unknown.setdefault(key, where)
    label = value.get("labels", value.get("label"))
    for one in label if isinstance(label, list) else [label]:
        if one is not None and not isinstance(one, (str, int)) and not (isinstance(one, float) and one.is_integer()):
            raise CaptureError(f"{where}: a label is {json_name(one)}, not an integer, a string or null")
    return Prompt(where, value["text"], value.get("target"), label, None if id is None else str(id))


def json_name(value):
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), f"the number {value}")


class Encoded:
    """Tokens of all prompts, unpadded.

    features  {name: [array a prompt]}: what the model is given, without masks
    ids       [array a prompt]: the tokens whose rows are captured
    special   [array a prompt]: 1 where a token of ids is not of the text
    """

    def __init__(self, features, ids, special):
        self.features, self.ids, self.special = features, ids, special

    def lengths(self):
        """Tokens of each prompt, both sides together: what sets the cost of its run."""
        count = [0] * len(self.ids)
        for name, rows in self.features.items():
            if name.endswith("input_ids"):
                count = [n + len(row) for n, row in zip(count, rows)]
        return count


def encode(prompts, tokenizer, max_tokens=None, special=True, start=None):
    """Tokenise.

    max_tokens  keep the first so many of each prompt
    special     let the tokenizer add BOS, [CLS], [SEP] and the like
    start       for the decoder's side: the token that its input begins with
    Raises CaptureError, with the line, for a prompt without tokens or, if start is given, without a target.
    """
    arguments = {"add_special_tokens": special, "return_special_tokens_mask": True}
    if max_tokens:
        # Truncation by the tokenizer keeps a closing [SEP] where the model was trained with one.
        arguments.update(truncation=True, max_length=max_tokens)

    def rows_of(texts):
        found = {}
        for begin in range(0, len(texts), 1000):
            try:
                part = tokenizer(texts[begin:begin + 1000], **arguments)
            except Exception as error:  # tokenizers raise nearly every built-in type
                raise CaptureError(f"cannot tokenise {prompts[begin].where} and what follows: {one_line(error)}")
            for name, rows in part.items():
                if name != "attention_mask":
                    found.setdefault(name, []).extend(array("q", row) for row in rows)
        return found.pop("input_ids"), found.pop("special_tokens_mask"), found

    ids, marks, others = rows_of([prompt.text for prompt in prompts])
    features = {"input_ids": ids, **others}
    for prompt, row in zip(prompts, ids):
        if len(row) == 0:
            raise CaptureError(f"{prompt.where}: the prompt has no tokens")
    if start is None:
        unused = next((prompt.where for prompt in prompts if prompt.target is not None), None)
        if unused:
            note(f"{unused}: \"target\" is used with --side decoder only")
        return Encoded(features, ids, marks)
    for prompt in prompts:
        if prompt.target is None:
            raise CaptureError(f"{prompt.where}: --side decoder needs a \"target\", the text that the decoder says")
    targets, marks, _ = rows_of([prompt.target for prompt in prompts])
    # The decoder is given its text one step late, as in training.
    features["decoder_input_ids"] = [array("q", [start]) + row[:-1] for row in targets]
    marks = [array("q", [1]) + mark[:-1] for mark in marks]
    return Encoded(features, features["decoder_input_ids"], marks)


def labels_of(prompts, encoded, whole):
    """A label for every token, or None if no prompt has any.

    whole(prompt)  the number of tokens and of special ones that the prompt has before truncation
    Returns ([array a prompt], names): names of the classes in order if labels are text, else None. A list of
    labels is for all tokens of its prompt, or for those of the text. Tokens without label have -100.
    """
    if all(prompt.label is None for prompt in prompts):
        return None, None
    seen = {}
    for prompt in prompts:
        for label in prompt.label if isinstance(prompt.label, list) else [prompt.label]:
            if label is not None:
                seen.setdefault(isinstance(label, str), (label, prompt.where))
    if len(seen) == 2:
        raise CaptureError(f"{seen[True][1]}: a label is text, and on {seen[False][1]} one is a number")
    names = None
    if True in seen:
        names = sorted({label for prompt in prompts
                        for label in (prompt.label if isinstance(prompt.label, list) else [prompt.label])
                        if label is not None})
    code = {name: number for number, name in enumerate(names)} if names else None

    def number(label, where):
        if label is None:
            return IGNORED
        value = code[label] if code else int(label)
        if not -2**63 <= value < 2**63:
            raise CaptureError(f"{where}: the label {value} is beyond 64 bits")
        return value

    out = []
    for prompt, ids, special in zip(prompts, encoded.ids, encoded.special):
        if not isinstance(prompt.label, list):
            out.append(array("q", [number(prompt.label, prompt.where)] * len(ids)))
            continue
        given = [number(label, prompt.where) for label in prompt.label]
        of_text = len(ids) - sum(special)
        if len(given) == len(ids):
            out.append(array("q", given))
            continue
        if len(given) != of_text:
            tokens, extra = whole(prompt)
            if len(given) not in (tokens, tokens - extra):
                raise CaptureError(f"{prompt.where}: {len(given)} labels for {tokens} tokens"
                                   + (f" ({tokens - extra} of them of the text)" if extra else ""))
            if len(given) == tokens and extra:
                raise CaptureError(f"{prompt.where}: with --max-tokens, give labels for the {tokens - extra} tokens of the text")
        rest = iter(given)
        out.append(array("q", [IGNORED if mark else next(rest) for mark in special]))
    return out, names


def texts_of(ids, tokenizer):
    """The text of each token by itself, as the tokenizer decodes it: UTF-8 bytes, and where each begins, then the end.

    Half a character, as byte-level tokenizers have them, is U+FFFD.
    """
    known, pieces, offsets, end = {}, [], array("q", [0]), 0
    for row in ids:
        for id in row:
            if id not in known:
                known[id] = tokenizer.decode([id], clean_up_tokenization_spaces=False).encode("utf-8", "replace")
            pieces.append(known[id])
            end += len(known[id])
            offsets.append(end)
    return b"".join(pieces), offsets


def plan(lengths, batch, window=64, padding=True):
    """Which sequences run together: [[index]], `batch` at most in each.

    Within a window of so many batches, sequences run by length, so that little is padded; windows keep
    the reading and writing local. The largest batch of all comes first: memory that does not suffice is noticed
    before anything is done. Without padding, only sequences of equal length run together.
    """
    out = []
    for begin in range(0, len(lengths), window * batch):
        order = sorted(range(begin, min(begin + window * batch, len(lengths))), key=lambda i: (-lengths[i], i))
        for i in order:
            new = not out or out[-1][0] < begin or len(out[-1]) == batch
            if new or not padding and lengths[out[-1][0]] != lengths[i]:
                out.append([])
            out[-1].append(i)
    if out:
        largest = max(range(len(out)), key=lambda k: (lengths[out[k][0]] * len(out[k]), -k))
        out.insert(0, out.pop(largest))
    return out
