"""The token that begins a document, where its vocabulary was made by others: found in its files, or named.

A tokenizer.json does not say which token that is. So it is looked for, and written into our copy of the file as a
post-processor that puts it in front of each text, as other programs then do too. Later only that, or one of the usual
names, counts: what a run's boundary is never depends on files beside it.
"""

import json
from pathlib import Path
from typing import Any

from pretrain.errors import DataError

# The names under which vocabularies keep the token put before each document: GPT-2 and ours, nanochat, Llama 3.
BOS = "<|endoftext|>"
BOS_NAMES = (BOS, "<|bos|>", "<|begin_of_text|>")

CONFIGURATIONS = ("tokenizer_config.json", "special_tokens_map.json")
OTHER_NAMES = ("<s>", "<bos>", "[BOS]", "<|startoftext|>", "<｜begin▁of▁sentence｜>", "</s>", "<eos>", "[EOS]", "[CLS]")

_MARK = "BOS"  # the name that our post-processor has for the token


def marked_boundary(spec: dict[str, Any]) -> int | None:
    """The id of the boundary that :func:`mark_boundary` wrote into a tokenizer.json; None if it did not."""
    match spec.get("post_processor"):
        case {"type": "TemplateProcessing", "special_tokens": {"BOS": {"ids": [int(id)]}}}:
            return id
    return None


def mark_boundary(spec: dict[str, Any], token: str, id: int) -> dict[str, Any]:
    """A tokenizer.json in which ``token`` is special and begins each text, whatever was put around texts before."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = {each["id"]: each for each in spec.get("added_tokens") or []}
    added[id] = {**added.get(id, {"id": id, "content": token, **flags}), "special": True}
    begins, text = {"SpecialToken": {"id": _MARK, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [begins, text],
        "pair": [begins, text, begins, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {_MARK: {"id": _MARK, "ids": [id], "tokens": [token]}},
    }
    return {**spec, "added_tokens": [added[id] for id in sorted(added)], "post_processor": template}


def find_boundary(spec: dict[str, Any], folder: Path) -> str:
    """The token that begins a document by a tokenizer.json and the files beside it; empty if nothing tells.

    It is the first that there is of: the ``bos_token`` of its configuration; what its post-processor puts before a
    text; one of BOS_NAMES; the ``eos_token`` of its configuration, or what is put after a text, since a token between
    documents serves both ends; one of OTHER_NAMES. Each must be an added token, which no text makes.
    """
    added = {token["content"] for token in spec.get("added_tokens") or []}
    configured = [_configuration(folder / name) for name in CONFIGURATIONS]
    before, after = _around_text(spec.get("post_processor") or {})
    candidates = [
        *(_content(tree.get("bos_token")) for tree in configured),
        before,
        *BOS_NAMES,
        *(_content(tree.get("eos_token")) for tree in configured),
        after,
        *OTHER_NAMES,
    ]
    return next((token for token in candidates if token in added), "")


def _configuration(file: Path) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read ({error}); repair it or take it away") from None
    return tree if isinstance(tree, dict) else {}


def _content(token: Any) -> str:
    """The name of a token, which a configuration writes alone or with its flags."""
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else ""


def _around_text(processor: dict[str, Any]) -> tuple[str, str]:
    """The tokens that a post-processor puts first and last around a text; empty where it puts none."""
    match processor:
        case {"type": "Sequence", "processors": [*processors]}:
            found = [_around_text(each) for each in processors]
            return next((a for a, _ in found if a), ""), next((b for _, b in reversed(found) if b), "")
        case {"type": "RobertaProcessing" | "BertProcessing", "cls": [str(before), _], "sep": [str(after), _]}:
            return before, after
        case {"type": "TemplateProcessing", "single": [*pieces], "special_tokens": dict(named)}:
            at = next((place for place, piece in enumerate(pieces) if "Sequence" in piece), len(pieces))
            names = [
                [
                    token
                    for piece in part
                    if "SpecialToken" in piece
                    for token in named[piece["SpecialToken"]["id"]]["tokens"]
                ]
                for part in (pieces[:at], pieces[at:])
            ]
            return (names[0] or [""])[0], (names[1] or [""])[-1]
    return "", ""
