"""A run in words that someone new to language models understands."""

from __future__ import annotations

import math
import shlex
from contextlib import suppress
from pathlib import Path

import numpy as np

from pretrain.errors import PretrainError
from pretrain.io import duration
from pretrain.runs import Run


def choices(loss: float) -> str:
    """Among how many equally likely tokens one would be as unsure."""
    count = math.exp(min(loss, 50))
    return f"{count:.1f}" if count < 10 else f"{count:,.0f}"


def held_out_in_words(loss: float, bits_per_byte: float | None) -> list[str]:
    """What the loss on held-out text means, in sentences."""
    said = [
        f"Held-out loss {loss:.3f} nats per token: before each next token it is as unsure as if it had to guess among"
        f" {choices(loss)} equally likely ones."
    ]
    if bits_per_byte is not None:
        said.append(
            f"That is {bits_per_byte:.3f} bits per byte: with its predictions, held-out text could be packed into"
            f" {bits_per_byte / 8:.0%} of its size. Random guessing of bytes would be 8."
        )
    return said


def test_in_words(run: Run, loss: float | None, bits_per_byte: float | None) -> list[str]:
    """What the test says, a sentence; none where there was no test."""
    if loss is None:
        return []
    bits = "" if bits_per_byte is None else f", {bits_per_byte:.3f} bits per byte"
    chosen = "; the best step was chosen on the held-out text" if run.config.checkpoint.keep_best else ""
    return [f"On the test text, by which nothing was chosen, it is {loss:.3f}{bits}{chosen}."]


def suggested_prompt(run: Run) -> str:
    """Something to try the model with: the run's own first prompt, or how a held-out text begins."""
    if prompt := next(filter(None, map(str.strip, run.config.sample.prompts)), ""):
        return prompt
    with suppress(PretrainError):  # its tokens may be gone
        corpus = run.corpus()
        stream = corpus.stream("val" if corpus.tokens("val") else "train")
        if not len(stream):  # of a stream that holds nothing out
            return ""
        (ids,) = stream.windows(np.zeros(1, np.int64), min(len(stream), 100)).tolist()
        text = corpus.tokenizer.decode(ids)
        words = "".join(each if each.isprintable() and each != "\ufffd" else " " for each in text).split()
        if ids[0] != corpus.tokenizer.bos_id and len(words) > 3:  # the first may be the end of a word
            words = words[1:]
        return " ".join(words[:3])[:24]
    return ""


def explain(run: Run, page: Path | None = None) -> str:
    """The closing words of training: what a finished run made, how good it is, and the next command to type."""
    summary = run.summary
    assert summary is not None, "only a finished run can be explained"
    vocabulary, loss, prompt = summary["vocab_size"], summary["val_loss"], suggested_prompt(run)
    meaning = held_out_in_words(loss, summary["val_bpb"]) if loss is not None else []
    if meaning:
        meaning[0] += f" Knowing nothing would be {math.log(vocabulary):.3f}, a guess among all {vocabulary:,}."
    meaning += test_in_words(run, summary.get("test_loss"), summary.get("test_bpb"))
    lines = [
        f"Made {run.folder}: a GPT of {summary['parameters'] / 1e6:.1f} million parameters, trained on"
        f" {summary['tokens'] / 1e6:.2f} million tokens in {duration(summary['seconds'])}.",
        *(f"  {sentence}" for sentence in meaning),
        f"  Numbers of every step: {run.metrics}" + (f"   All of it on a page: {page}" if page else ""),
        f"Next, let it write:  pretrain sample {shlex.quote(str(run.folder))} --prompt {shlex.quote(prompt)}",
    ]
    return "\n".join(lines)
