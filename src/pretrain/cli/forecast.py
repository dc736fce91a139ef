"""``pretrain forecast``: what a larger run would reach."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pretrain.cli.parsing import Command
from pretrain.config.schema import Natural, NonNegative


@dataclass
class Forecast(Command):
    """Predict the loss of a larger run from a ladder of small ones: docs/experiments.md.

    Fits the final held-out losses of the finished runs by L = E + A / N^alpha + B / D^beta (Chinchilla, arXiv
    2203.15556), N the parameters that a token is multiplied with, D the training tokens. That needs six sizes that vary
    both; where both vary together, as with a fixed ratio, the fit is over FLOPs. forecast.json and forecast.png are
    written to the ladder; 'pretrain plan RECIPE --forecast LADDER' predicts a run that is planned, 'pretrain report RUN
    --forecast LADDER' shows the prediction beside what was measured.
    """

    ladder: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="LADDER [LADDER ...]")]
    """Folders of run directories, or run directories. Those that are not finished are left out."""
    target: Annotated[str, tyro.conf.arg(name="for", metavar="RECIPE|RUN")] = ""
    """Predict this recipe, TOML file or run, which is left out of the ladder."""
    parameters: Natural = 0
    """Predict a model of so many parameters, those of its blocks' matrices and its head, with --tokens."""
    tokens: Natural = 0
    """Training tokens of that model."""
    flops: NonNegative = 0.0
    """Predict the best that so many FLOPs of training can reach, and at which size."""
    json: bool = False
    """Print one JSON object."""

    def __post_init__(self):
        if not self.ladder:
            raise ValueError("LADDER is missing: give a folder of runs")
        if bool(self.parameters) != bool(self.tokens):
            raise ValueError("--parameters and --tokens go together; give both")
        if sum(map(bool, (self.target, self.parameters, self.flops))) > 1:
            raise ValueError("--for, --parameters and --flops each name a target; give one of them")

    def __call__(self) -> int:
        import msgspec

        from pretrain.config import load_config
        from pretrain.experiments.forecast import Size, draw, forecast
        from pretrain.plan import make_plan
        from pretrain.runs import Run

        run = Run.open(self.target) if self.target and Run.exists(Path(self.target)) else None
        found = forecast(self.ladder, self.target if run else "")
        measured = run.summary.get("val_loss") if run and run.summary else None
        predicted = best = None
        if run:
            predicted = found.of_run(run)
        elif self.target:
            predicted = make_plan(load_config(self.target), measure=False).predicted(found)
        elif self.parameters:
            predicted = found.predict(found.size(self.parameters, self.tokens))
        elif self.flops:
            predicted = found.predict(found.best(self.flops)[0] if found.separable else Size(self.flops))
        if predicted and found.separable:
            best = found.best(predicted.size.flops)
        first = Path(self.ladder[0])
        file = found.save(first.parent if Run.exists(first) else first)
        draw(found, predicted, file.with_suffix(".png"))
        if self.json:
            told = {"formula": found.formula, "target": predicted, "measured": measured, "best": best}
            tree = {**msgspec.to_builtins(found), **told, "resampled": len(found.resampled)}
            print(msgspec.json.encode(tree).decode())
            return 0
        print(found)
        if predicted:
            print(f"\n{predicted.size}\n{predicted.beside(measured)}")
        if best:
            size, low, high = best
            parts = f"{size.parameters:,} parameters (95 %: {low:,.0f} to {high:,.0f}), {size.tokens:,} tokens"
            print(f"Best for these FLOPs: loss {found.loss(size):.4f} with {parts}")
        print(f"Wrote {file} and {file.with_suffix('.png').name}")
        return 0
