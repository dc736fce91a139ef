"""What the page says of a run beside its curves: results, the loss in plain words, data, configuration, environment.

run directory → facts; and its curves → progress: both as the template facts.html shows them
"""

from __future__ import annotations

import math
import shlex
from collections import Counter
from contextlib import suppress
from typing import Any

from pretrain.config import as_chosen, load_config
from pretrain.errors import PretrainError
from pretrain.experiments.groups import flat
from pretrain.io import duration, without_secrets
from pretrain.report.baselines import Baselines, baselines
from pretrain.report.curves import OF_ALL, Curves
from pretrain.report.words import choices, held_out_in_words, suggested_prompt, test_in_words
from pretrain.runs import Run
from pretrain.runs.checkpoint import AVERAGE
from pretrain.runs.environment import read_environment
from pretrain.runs.metrics import OVERFIT, SMOOTHED_LOSS
from pretrain.sizing import count_parameters, flops_per_token, resolve
from pretrain.text.split import TEST
from pretrain.tokens import Manifest, training_order

RECENT_STEPS = 50
"""Steps that the time left is estimated from."""

Pairs = list[tuple[str, str]]


def facts(run: Run, patient: bool = False) -> dict[str, Any]:
    """What does not change with every step. Numbers that are not known yet are 0, texts empty.

    ``patient``: as in :func:`baselines`.
    """
    manifest, vocabulary, parameters, flops, caution = None, 0, 0, 0, ""
    with suppress(PretrainError, OSError):
        tokenizer = run.tokenizer()
        vocabulary, caution = tokenizer.vocab_size, tokenizer.change_in_words
        parameters = sum(count_parameters(run.config.model, vocabulary).values())
        flops = flops_per_token(run.config.model, vocabulary)
    with suppress(PretrainError, OSError):
        manifest = Manifest.load(run.data)
    recipe, fields = configuration(run, vocabulary)
    return {
        "model": run.config.model,
        "vocabulary": vocabulary,
        "parameters": parameters,
        "flops_per_token": flops,
        "caution": caution,
        "manifest": manifest,
        "baselines": baselines(run, patient),
        "data": data(run, manifest),
        "recipe": recipe,
        "config": fields,
        "environment": environment(run),
        "commands": commands(run),
    }


def progress(run: Run, curves: Curves, known: dict[str, Any]) -> dict[str, Any]:
    """What changes with every step; ``known`` are the :func:`facts`."""
    return {
        "results": results(run, curves, known["vocabulary"], known["parameters"], known["flops_per_token"]),
        "remarks": remarks(run, curves, known["baselines"], known["manifest"], known["caution"]),
        "losses": losses(run, curves, known["baselines"], known["manifest"]),
    }


def results(run: Run, curves: Curves, vocabulary: int, parameters: int, flops: int) -> dict[str, str]:
    """The newest numbers, by label; the same labels for every run."""
    train, val = curves.train, curves.val
    step, tokens, seconds = (train.last(name) or 0 for name in ("step", "tokens", "time"))

    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    at, loss, bits = model_held_out(run, curves) or (None, None, None)
    test, test_bits = model_test(run, curves)
    average = ", average of the weights" if at is not None and run.weights(int(at)) == AVERAGE else ""
    return {
        "model": f"of step {at:,.0f}{average}" if average or earlier_best(run) else "",
        "held-out loss": shown(loss, ".4f"),
        "predicted loss": "",
        "bits per byte": shown(bits, ".4f"),
        "test loss": shown(test, ".4f"),
        "test, bits per byte": shown(test_bits, ".4f"),
        "CORE": shown(val.last("val/core"), ".4f"),
        "training loss, smoothed": shown(train.last(SMOOTHED_LOSS), ".4f"),
        "steps": f"{step:,.0f}" + ("" if run.summary else f" of {run.config.train.steps:,}"),
        "tokens": f"{tokens:,.0f}",
        "time": duration(seconds) if seconds else "",
        "left, about": "" if run.summary else time_left(run, curves),
        "tokens per second": shown(tokens / seconds if seconds else None, ",.0f"),
        "parameters": shown(parameters or None, ","),
        "vocabulary": shown(vocabulary or None, ","),
        "FLOPs": shown(flops * tokens or None, ".3g"),
        "skipped steps": shown(len(curves.skipped()) or None, ","),
    }


def time_left(run: Run, curves: Curves) -> str:
    """How long the steps that are left take, at the pace of the last ones."""
    steps, times = (curves.train.column(name)[-1 - RECENT_STEPS :] for name in ("step", "time"))
    if len(steps) < 2 or not times[-1] > times[0]:
        return ""
    return duration((run.config.train.steps - steps[-1]) * (times[-1] - times[0]) / (steps[-1] - steps[0]))


# The loss in plain words -----------------------------------------------------------------------------------------


Validation = tuple[float, float, float | None]
"""Step, loss and bits per byte."""


def held_out(curves: Curves, of: str = "") -> list[Validation]:
    """Each validation, over text that compares; with ``OF_ALL`` those over all of it where others were not."""
    columns = [curves.val.column(name).tolist() for name in ("step", f"val/loss{of}", f"val/bpb{of}")]
    rows = [row for row in zip(*columns, strict=True) if math.isfinite(row[1])]
    return [(step, loss, bits if math.isfinite(bits) else None) for step, loss, bits in rows]


def newest_held_out(curves: Curves) -> Validation | None:
    """The newest validation, over all held-out text if that was measured."""
    newest = [*held_out(curves, OF_ALL)[-1:], *held_out(curves)[-1:]]  # of one step the first is taken
    return max(newest, key=lambda row: row[0], default=None)


def earlier_best(run: Run) -> dict[str, Any] | None:
    """The summary of a finished run whose model is of an earlier step than its last (checkpoint.keep_best)."""
    summary = run.summary
    return summary if summary and summary.get("model_step", summary["steps"]) != summary["steps"] else None


def model_held_out(run: Run, curves: Curves) -> Validation | None:
    """Of the model that the run leaves, over all held-out text if that was measured; before its end of the newest."""
    if best := earlier_best(run):
        return best["model_step"], best["val_loss"], best["val_bpb"]
    return newest_held_out(curves)


def model_test(run: Run, curves: Curves) -> tuple[float | None, float | None]:
    """Loss and bits per byte of that model on the test text."""
    if best := earlier_best(run):
        return best.get("test_loss"), best.get("test_bpb")
    return curves.val.last("test/loss"), curves.val.last("test/bpb")


def losses(run: Run, curves: Curves, counted: Baselines | None, manifest: Manifest | None) -> list[dict[str, Any]]:
    """What losses mean: guessing without a model, and this model in the course of its training."""
    rows: list[dict[str, Any]] = []

    def add(what: str, loss: float | None, bits: float | None, meaning: str, ours: bool = False) -> None:
        shown = "" if loss is None else choices(loss)
        rows.append({"what": what, "loss": loss, "choices": shown, "bits": bits, "meaning": meaning, "ours": ours})

    if counted:
        bits, seen = counted.bits_per_byte, f"{counted.tokens:,} training tokens"
        add("guess any token", counted.uniform, bits(counted.uniform), "knows nothing: every token is equally likely")
        add("count tokens", counted.unigram, bits(counted.unigram), f"knows how frequent each token is among {seen}")
        add("count pairs", counted.bigram, bits(counted.bigram), f"also looks at the token before, by pairs of {seen}")
        add("a zip file", None, counted.zipped, "deflate applied to the held-out text")
        (first, second), whole = counted.compressed_bytes, counted.compressed_all
        texts = f"{first:,} bytes of training text, then {second:,} of held-out text"
        texts = f"all the text, {texts}" if whole else f"the last {texts}"
        for how, of_a_byte in counted.compressed.values():
            meaning = f"learns from {texts}; it goes on learning inside that, which a GPT does not"
            add(how, None, of_a_byte, meaning)
    if measured := held_out(curves):
        # The keys make one row of a measurement that is both the last and the lowest.
        lowest = min(measured, key=lambda row: row[1])
        named = {measured[0]: "first measured", lowest: "lowest", measured[-1]: "last measured"}
        for (step, loss, bits), which in sorted(named.items(), key=lambda item: item[0][0]):
            add(f"held-out text, {which}", loss, bits, f"this model after step {step:,.0f}", ours=True)
    for step, loss, bits in held_out(curves, OF_ALL)[-1:]:
        add("all held-out text", loss, bits, f"this model after step {step:,.0f}; the others are a part", ours=True)
    if best := earlier_best(run):
        meaning = f"this model after step {best['model_step']:,}, the best, which the run leaves"
        add("all held-out text", best["val_loss"], best["val_bpb"], meaning, ours=True)
    loss, bits = model_test(run, curves)
    if loss is not None:
        add("test text", loss, bits, "the model that the run leaves, on text that nothing was chosen by", ours=True)
    if loss := curves.train.last(SMOOTHED_LOSS):
        bytes_per_token = manifest.bytes_per_token if manifest else (run.summary or {}).get("bytes_per_token")
        bits = loss / (math.log(2) * bytes_per_token) if bytes_per_token else None
        step = curves.train.last("step") or 0
        add("training text", loss, bits, f"this model up to step {step:,.0f}, smoothed", ours=True)
    return rows


def remarks(
    run: Run, curves: Curves, counted: Baselines | None, manifest: Manifest | None, caution: str = ""
) -> list[str]:
    """What the numbers say, in sentences; ``caution``: what bits per byte are of, if not of the text as it stands."""
    said: list[str] = [f"{caution[:1].upper()}{caution[1:]}."] if caution else []
    if measured := held_out(curves):
        loss = measured[-1][1]
        best, (_, of_all, bits) = earlier_best(run), model_held_out(run, curves) or measured[-1]
        said += held_out_in_words(of_all, bits)
        said += test_in_words(run, *model_test(run, curves))
        if best:
            said.append(
                f"That is the model of step {best['model_step']:,}, the best, which sample, eval and export use."
            )
        elif of_all != loss:
            said.append(
                f"That is of all held-out text. The validations before, and the curve, take"
                f" {run.config.eval.tokens:,} tokens of it: over these it is {loss:.3f} now."
            )
        left = of_all if best else loss
        if counted and left > counted.unigram:
            said.append("That is no better yet than knowing how frequent each token is.")
        elif counted and left > counted.bigram:
            said.append("That is better than knowing how frequent each token is, but not yet than counting pairs.")
        at, lowest, _ = min(measured, key=lambda row: row[1])
        if loss > lowest + OVERFIT:
            said.append(
                f"The held-out loss was lowest, {lowest:.3f}, after step {at:,.0f}, and has risen to {loss:.3f} since:"
                f" the model memorises its training text. Fewer steps, more text or dropout help"
                + ("." if best else "; --checkpoint.keep_best keeps the weights of the lowest.")
            )
        if counted and not counted.compressed:
            said.append(
                f"What xz (and PPMd, with pretrain[ppmd]) make of this text takes some seconds to find out:"
                f" pretrain report {shlex.quote(str(run.folder))}"
            )
    tokens = curves.train.last("tokens")
    if manifest and tokens and manifest.tokens("train"):
        said.append(f"It has seen its training text {tokens / manifest.tokens('train'):.2f} times.")
    limit = run.config.train.grad_clip
    clipped, steps = curves.clipped(limit, run.config.train.grad_clip_from)
    if steps:
        said.append(
            f"Gradients were clipped to norm {limit:g} at {clipped:,} of {steps:,} steps ({clipped / steps:.1%})."
        )
    if reasons := Counter(reason for _, reason in curves.skipped()):
        names = {1: "not finite", 2: "a spike"}
        counts = ", ".join(f"{count:,} {names[reason]}" for reason, count in sorted(reasons.items()))
        said.append(f"Skipped steps, which changed nothing: {counts}.")
    return said


# Data, configuration, environment --------------------------------------------------------------------------------


def data(run: Run, manifest: Manifest | None) -> Pairs:
    """The text of a run, and the token shards made of it."""
    rows = [("text", ", ".join(without_secrets(run.config.data.paths)) or "the embedded corpus (the King James Bible)")]
    if manifest is None:
        return rows
    for split, name in (("train", "training"), ("val", "held out"), ("test", "test")):
        shards = [shard for shard in manifest.shards if shard.split == split]
        if split == TEST and not shards:
            continue
        size, counted = sum(shard.text_bytes for shard in shards), manifest.tokens(split)
        sizes = f"documents {manifest.documents(split):,}, tokens {counted:,}, bytes of text {size:,}"
        rows.append((name, f"{sizes}, shards {len(shards):,}"))
    return [
        *rows,
        ("vocabulary", f"{manifest.vocab_size:,} tokens, {manifest.bytes_per_token:.2f} bytes of text each on average"),
        ("fingerprint", manifest.fingerprint),
        *(("problem", line.removeprefix("problem").strip()) for line in manifest.problem_lines()),
    ]


def configuration(run: Run, vocabulary: int) -> tuple[str, list[tuple[str, str, str]]]:
    """The recipe that the run was started with, and each field, its value, and the recipe's if that differs.

    The recipe is empty where the recorded command does not tell it or it is not there any more.
    """
    name, recipe = "", None
    starts = read_environment(run.folder)
    program, command, *words = [*(starts[0].get("command") or [] if starts else []), "", ""]
    if (program, command) == ("pretrain", "train") and not run.fork:
        without = "fit" if run.config.fit.chosen else "quickstart"
        given = words[0] if words[0] and not words[0].startswith("-") else without
        with suppress(PretrainError):
            theirs = as_chosen(load_config(given), run.config)  # what was chosen is as in the recipe
            windows = training_order(run.corpus(), theirs).windows if theirs.train.epochs else 0
            # Without what was given where it would be chosen, nothing follows from the rest.
            name, recipe = given, theirs if theirs.fit.fields else resolve(theirs, vocabulary, windows)[0]
    usual = dict(flat(recipe or run.config))
    return name, [(field, ours, "" if ours == usual[field] else usual[field]) for field, ours in flat(run.config)]


def environment(run: Run) -> Pairs:
    """Hardware and software of the first start of a run, and where those of later starts differ."""
    rows: Pairs = []
    for start in read_environment(run.folder):
        step, known = start.pop("step", 0), dict(rows)
        now = start_rows(start)
        if not rows:
            rows = now
            continue
        changed = "; ".join(f"{name} {value}" for name, value in now if known.get(name) != value)
        rows.append((f"resumed after step {step}", changed or "the same"))
    return rows


def start_rows(start: dict[str, Any]) -> Pairs:
    """What environment.json has of a start, as text."""
    packages = start.pop("packages", {})
    rows = []
    for name, value in without_secrets({**start, **packages}).items():
        if name == "command":
            value = shlex.join(map(str, value))
        if name.endswith("_bytes"):
            name, value = name.removesuffix("_bytes"), f"{value / 2**30:.1f} GiB"
        if value not in ("", None):
            rows.append((name.replace("_", " "), str(value)))
    return rows


def commands(run: Run) -> Pairs:
    """What can be done with a run, each with its command."""
    folder, prompt = shlex.quote(str(run.folder)), shlex.quote(suggested_prompt(run))
    if run.summary:
        go_on = ("train it longer", f"pretrain train --out {folder} --train.steps {2 * run.config.train.steps}")
    else:
        go_on = ("go on with it", f"pretrain train --out {folder}")
    again = ("make the same again", f"pretrain train {folder}/config.toml --out {folder}-again")
    return [
        *([] if run.fork else [again]),
        go_on,
        ("let it write", f"pretrain sample {folder} --prompt {prompt}"),
        ("measure it", f"pretrain eval {folder}"),
        ("give it to others", f"pretrain export {folder} --out {folder}-hf"),
        ("this page again", f"pretrain report {folder}"),
        ("watch it", f"pretrain watch {folder}"),
    ]
