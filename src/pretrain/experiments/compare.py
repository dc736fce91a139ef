"""Which settings are better, as far as their seeds show it.

groups of finished runs → of each pair Student's t, or of one seed each a bootstrap over text → Holm → Verdict
"""

from __future__ import annotations

import functools
import hashlib
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import fmean, stdev, variance
from typing import Any

import numpy as np

from pretrain.errors import UsageError
from pretrain.evaluation.measure import held_out_targets
from pretrain.experiments.groups import Group, settings
from pretrain.io import table
from pretrain.runs import Run
from pretrain.tokens import Corpus, Origin

LEVEL, POWER, MOST_MORE = 0.95, 0.8, 100
"""Of intervals and verdicts; of more seeds to show a difference; and how many more are still counted."""
PARTS, LEAST_PARTS, RESAMPLES = 50, 20, 10_000
"""Parts of the text that a bootstrap draws from, documents at least, and how often it draws."""
NODES, WEIGHTS = np.polynomial.legendre.leggauss(200)

Found = tuple[str, float, float, float, float, int | None]
"""Method, difference, its interval, p, and how many more seeds of each would show it."""


@dataclass(frozen=True)
class Verdict:
    """What can be said of a group against another, by the bits that a byte of held-out text costs."""

    group: str
    against: str
    of: str  # settings; or weights, where there is one seed each: of these two models on this text
    method: str
    difference: float  # bits per byte; below 0 the group is better
    low: float  # the 95 % confidence interval
    high: float
    p: float  # the chance of so great a difference if there were none; of several comparisons by Holm's correction
    more_seeds: int | None = None  # of each, that would decide with a chance of 80 %; None: unknown, or above MOST_MORE
    verdict: str = ""  # better, worse or cannot tell
    words: str = ""


@dataclass(frozen=True)
class Comparison:
    """Groups with their numbers, what can be said of them, and how that is meant."""

    groups: list[dict[str, Any]]
    verdicts: list[Verdict]
    notes: list[str]

    def rows(self) -> list[list[str]]:
        """A table: its head, and of each group the seeds and both numbers, as their mean and spread."""
        rows = [["", "seeds", "loss: mean, deviation, range", "bits per byte: mean, deviation, range"]]
        for group in self.groups:
            seeds, numbers = len(group["seeds"]), (group["loss"], group["bits_per_byte"])
            shown = "{mean:.4f} ± {deviation:.4f}, {least:.4f} to {greatest:.4f}" if seeds > 1 else "{mean:.4f}"
            rows.append([group["name"], str(seeds), *(shown.format(**number) for number in numbers)])
        return rows

    def __str__(self) -> str:
        return "\n".join([table(self.rows()), *(f"\n{each.words}" for each in self.verdicts), "", *self.notes]).rstrip()


def compare(groups: Sequence[Group], measure: bool = True) -> Comparison:
    """What can be said of groups, each against the first, or those of a single folder against the best of them.

    Runs that are not finished are left out, which is noted. Without ``measure`` no model is run: groups of one seed
    each are then not compared. Raises a PretrainError if no run is finished, or they were not measured alike.
    """
    groups, notes = _finished(groups)
    notes += _check_alike([run for group in groups for run in group.runs])
    found, bits = [], []
    for group in groups:
        ends = {run.config.train.seed: run.summary or {} for run in group.runs}
        bits.append({seed: end["val_bpb"] for seed, end in ends.items()})
        numbers = {"loss": [end["val_loss"] for end in ends.values()], "bits_per_byte": [*bits[-1].values()]}
        spreads = {name: _spread(values) for name, values in numbers.items()}
        found.append({"name": group.name, "runs": [str(run.folder) for run in group.runs], "seeds": [*ends], **spreads})
    best = bool(groups[0].folder) and len({group.folder for group in groups}) == 1
    base = min(range(len(groups)), key=lambda i: found[i]["bits_per_byte"]["mean"]) if best else 0
    pairs = [(j, i) if i == base else (i, j) for i, j in combinations(range(len(groups)), 2)]
    single = [pair for pair in pairs if len(bits[pair[0]]) == len(bits[pair[1]]) == 1]
    pairs = [pair for pair in pairs if (best or pair[1] == base) and (measure or pair not in single)]
    parts = functools.cache(lambda number: _parts(*held_out_targets(groups[number].runs[0])))
    verdicts = []
    for i, j in pairs:
        ours, theirs = groups[i], groups[j]
        if (i, j) in single:
            verdicts.append(Verdict(ours.name, theirs.name, "weights", *bootstrap(parts(i), parts(j))))
        else:
            paired = _data(ours.runs[0]) == _data(theirs.runs[0]) and bits[i].keys() == bits[j].keys()
            result = t_test(bits[i], bits[j], paired, 1 - (1 - LEVEL) / len(pairs))
            verdicts.append(Verdict(ours.name, theirs.name, "settings", *result))
    corrected = map(_decided, verdicts, holm([each.p for each in verdicts]))
    verdicts = [each for each, (_, other) in zip(corrected, pairs, strict=True) if other == base]
    if len(pairs) > 1:
        which = "of all pairs, since the best was chosen by these numbers" if best else "with the first"
        notes.append(f"p is corrected for {len(pairs)} comparisons {which} (Holm); the intervals are of each alone.")
    if single and not measure:
        notes.append("Groups of one seed each are compared, token by token, by 'pretrain compare'.")
    elif any(each.of == "weights" for each in verdicts):
        notes.append(
            "One seed each: that is of these two models on this text. Which setting is better it cannot show: another"
            " seed may reverse it."
        )
    forks = [[run.fork["weights"] for run in group.runs if run.fork] for group in groups]
    if any(len(set(weights)) < len(weights) for weights in forks):
        notes.append(
            "Runs of a group are forks of one checkpoint: they share what came before it, and would spread more if each"
            " had been trained from the start."
        )
    if len(groups) == 1:
        notes.append("These are one group, the same settings with other seeds: there is nothing to compare it with.")
    return Comparison(found, verdicts, notes)


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    deviation = stdev(values) if len(values) > 1 else None
    return {"mean": fmean(values), "deviation": deviation, "least": min(values), "greatest": max(values)}


def _decided(found: Verdict, p: float) -> Verdict:
    """What is found, in words, by the corrected ``p``."""
    verdict, more = "better" if found.difference < 0 else "worse", None
    said = f"{found.group} is {verdict} than {found.against}" + " on this text, as a model" * (found.of == "weights")
    if p >= 1 - LEVEL:
        verdict, more, said = "cannot tell", found.more_seeds, f"Cannot tell {found.group} from {found.against}"
        needed = f"it takes over {MOST_MORE} more seeds of each"
        needed = f"about {more} more seed{'s' * (more > 1)} of each would" if more else needed
        said += f": {needed}" if found.of == "settings" else " on this text, as models"
    numbers = f"{found.difference:+.4f} bits per byte, 95 % interval {found.low:+.4f} to {found.high:+.4f}"
    words = f"{said}. Difference {numbers}, p {p:.2g} ({found.method})."
    return replace(found, p=p, verdict=verdict, more_seeds=more, words=words)


# What can be compared ---------------------------------------------------------------------------------------------


def _finished(groups: Sequence[Group]) -> tuple[list[Group], list[str]]:
    """Groups of the runs that ended with a held-out loss, and a note on each of the others."""
    kept, notes = [], []
    for group in groups:
        ends = [(run, run.summary or {}) for run in group.runs]
        numbers = [(run, [end.get(name) or math.nan for name in ("val_loss", "val_bpb")]) for run, end in ends]
        good = tuple(run for run, measured in numbers if all(map(math.isfinite, measured)))
        kept += [replace(group, runs=good)] if good else []
        for run, end in ends:
            why = "has no held-out loss at its end: its group may look better than it is" if end else "is not finished"
            notes += [f"Left out: {run.folder} {why}."] if run not in good else []
    if not kept:
        raise UsageError(f"there is nothing to compare. {' '.join(notes)}")
    return kept, notes


def _check_alike(runs: Sequence[Run]) -> list[str]:
    """A UsageError unless all were measured in the same way on the same text; a note if of other tokens."""
    first, different = runs[0], {}
    for run in runs:
        if run.config.eval.stride != first.config.eval.stride:
            strides = f"eval.stride {first.config.eval.stride} and {run.config.eval.stride}"
            raise UsageError(f"{first.folder} and {run.folder} were measured with {strides}, which do not compare")
        different.setdefault(Origin.load(run.folder).tokens or run.corpus().fingerprint, run)
    if len(different) == 1:
        return []
    for run in different.values():
        if run is not first and text_hash(run) != text_hash(first):
            raise UsageError(
                f"{first.folder} and {run.folder} were measured on different text; measure them on the same:"
                f" pretrain eval {first.folder} {run.folder} --data FILE"
            )
    return ["Their tokens differ, or what was trained on: losses may not compare, bits per byte do."]


_HASHES: dict[tuple[str, ...], str] = {}
"""Of held-out texts, by their tokens and tokenizer: to decode a large one takes long, and many runs have the same."""


def text_hash(run: Run) -> str:
    """A hash of all held-out text."""
    corpus = run.corpus()
    foreign = [dataset.name for dataset in corpus.datasets if not dataset.tokenizer]  # whose fingerprint is of samples
    key = corpus.fingerprint, corpus.tokenizer.fingerprint, *foreign
    if key not in _HASHES:
        _HASHES[key] = _hash_of(corpus)
    return _HASHES[key]


def _hash_of(corpus: Corpus) -> str:
    digest = hashlib.sha256()
    for stream in (dataset.stream("val") for dataset in corpus.datasets):
        for start in range(0, len(stream), 2**20):
            ids = stream.windows(np.array([start]), min(2**20, len(stream) - start))[0]
            digest.update(corpus.tokenizer.decode_bytes(ids.tolist()))
    return digest.hexdigest()


def _data(run: Run) -> list[Any]:
    """What makes up the order of its data, besides the seed."""
    fields = [field for field in settings(run).items() if field[0].startswith("data.")]
    return [run.config.train.batch_tokens, run.config.model.context_length, *fields]


# Several seeds: Student's t ---------------------------------------------------------------------------------------


def within(angle: float, freedom: float) -> float:
    """How much of Student's t distribution lies between -t and t, where t is sqrt(freedom) · tan(angle).

    By that substitution its density is cos(angle) to the power of freedom - 1, up to a constant.
    """
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    return constant * angle * float(WEIGHTS @ np.cos(angle / 2 * (NODES + 1)) ** (freedom - 1))


def t_within(share: float, freedom: float) -> float:
    """The t between whose negative and which ``share`` of Student's t distribution lies."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle, freedom) < share else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def t_test(ours: Mapping[int, float], theirs: Mapping[int, float], paired: bool, level: float) -> Found:
    """What numbers by seed, two at least of either group, say of the difference of their means.

    ``paired``: the seeds are the same, on the same data. ``level``: at which more seeds are to show such a difference
    with a chance of POWER; None: more than MOST_MORE.
    """
    a, b = ([numbers[seed] for seed in sorted(numbers)] for numbers in (ours, theirs))
    n, m, difference = len(a), len(b), fmean(a) - fmean(b)
    if paired:
        single = variance([x - y for x, y in zip(a, b, strict=True)])  # of the difference of one seed of each
        method, square, freedom, per_seed = f"paired t of {n} seeds", single / n, n - 1, 1.0
    else:
        v, w = variance(a if n > 1 else b), variance(b if m > 1 else a)
        method, single, square = f"Welch's t of {n} and {m} seeds", v + w, v / n + w / m
        freedom, per_seed = n + m - 2, 2.0
        if min(n, m) == 1:
            method = f"Student's t of {n} and {m} seeds, as if they varied alike"
        elif square:  # Welch, Biometrika 34 (1947)
            freedom = square**2 / ((v / n) ** 2 / (n - 1) + (w / m) ** 2 / (m - 1))
            per_seed = (v + w) ** 2 / (v**2 + w**2)
    reach = t_within(LEVEL, freedom) * math.sqrt(square)
    p = max(0.0, 1 - within(math.atan2(abs(difference), math.sqrt(square * freedom)), freedom))

    def show(seeds: int) -> bool:
        needed = sum(t_within(share, per_seed * (seeds - 1)) for share in (level, 2 * POWER - 1))
        return 0 < needed * math.sqrt(single / seeds) <= abs(difference)

    more = 1 + bisect_left(range(min(n, m) + 1, min(n, m) + MOST_MORE + 1), True, key=show)
    return method, difference, difference - reach, difference + reach, p, more if more <= MOST_MORE else None


def holm(chances: Sequence[float]) -> list[float]:
    """The p values of several comparisons, corrected so that any of them is wrong as rarely as a single one.

    Holm, Scandinavian Journal of Statistics 6 (1979).
    """
    corrected, highest = [0.0] * len(chances), 0.0
    for rank, place in enumerate(sorted(range(len(chances)), key=chances.__getitem__)):
        corrected[place] = highest = max(highest, min(1.0, (len(chances) - rank) * chances[place]))
    return corrected


# One seed each: a bootstrap over parts of the text ----------------------------------------------------------------


def _parts(nats: np.ndarray, sizes: np.ndarray, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nats and bytes (N, 2) of the documents, neighbours together where they are many, and of blocks of equal bytes."""
    total, number = int(sizes.sum()), int(documents[-1]) + 1
    count = min(PARTS, number)
    after = total - np.cumsum(sizes)  # from the end: tokenizers differ in the first token, which is no target
    places = ((documents * count // number, count), (np.minimum(after * PARTS // total, PARTS - 1), PARTS))
    both = (np.stack([np.bincount(place, each, most) for each in (nats, sizes)], axis=1) for place, most in places)
    return next(both), next(both)


def bootstrap(ours: tuple[np.ndarray, np.ndarray], theirs: tuple[np.ndarray, np.ndarray]) -> Found:
    """What the parts of a text, the same of both, say of the difference in bits per byte: percentiles over draws."""
    (a, blocks), (b, other_blocks) = ours, theirs
    sizes, method = a[:, 1], f"bootstrap over the documents, in {len(a)} parts"
    if len(a) != len(b) or sizes.sum() ** 2 < LEAST_PARTS * (sizes**2).sum():  # few documents, or few have most bytes
        a, b, size = blocks, other_blocks, blocks[:, 1].mean()
        method = f"bootstrap over {len(a)} blocks of {size:,.0f} bytes"

    def difference(draws: np.ndarray) -> np.ndarray:
        nats, size, other_nats, other_size = (draws @ np.concatenate([a, b], axis=1)).T
        return (nats / size - other_nats / other_size) / math.log(2)

    drawn = difference(np.random.default_rng(0).multinomial(len(a), np.full(len(a), 1 / len(a)), RESAMPLES))
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    tail = int(min((drawn <= 0).sum(), (drawn >= 0).sum()))
    return method, difference(np.ones((1, len(a)))).item(), low, high, min(1.0, 2 * (tail + 1) / (RESAMPLES + 1)), None
