"""``pretrain sample``: text from a run's model."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Annotated, Literal

import tyro

from pretrain.cli.launch import importing
from pretrain.cli.parsing import Command
from pretrain.config.sampling import SamplingOptions
from pretrain.config.schema import Count


@dataclass
class Sample(Command):
    """Generate text with a run's model.

    A single text is printed as it is generated. Of several (--num-samples, --prompt given again, --prompts-file) each
    follows a line with its prompt, sample and seed; a text depends only on its prompt and seed, not on the others.
    """

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """A run directory."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Text to continue; may be given several times. -: read it from standard input. None: begin a new document."""
    prompts_file: str = ""
    """A file of prompts, one per line; or .jsonl, the field 'prompt' of each object."""
    num_samples: Count = 1
    """Texts for each prompt."""
    interactive: bool = False
    """Read prompts from the terminal, one per line, until Ctrl-D or 'quit'. Ctrl-C stops an answer."""
    json: bool = False
    """Print one JSON object per text: prompt, text, tokens (how many), seed."""
    options: Annotated[SamplingOptions, tyro.conf.arg(name="")] = field(default_factory=SamplingOptions)
    step: int = 0
    """Use the checkpoint of this step. 0: the newest, or the best that the finished run kept (checkpoint.keep_best)."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""

    def __post_init__(self):
        if self.interactive and (self.prompt or self.prompts_file or self.json or self.num_samples > 1):
            raise ValueError(
                "--interactive reads its prompts from the terminal and prints one text for each; leave out --prompt,"
                " --prompts-file, --json and --num-samples"
            )

    def __call__(self) -> int:
        with importing():
            from pretrain.device import choose_device, choose_precision
            from pretrain.generation import encode_prompt, sample_text, sample_texts
            from pretrain.generation.terminal import converse, print_as_it_comes, read_prompts
            from pretrain.runs import Run
            from pretrain.runs.checkpoint import AVERAGE

        run = Run.open(self.run)
        prompts = [sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt for prompt in self.prompt]
        prompts += read_prompts(self.prompts_file) if self.prompts_file else []
        prompts = prompts or [""]
        device = choose_device(self.device)
        checkpoint, summary = run.model_checkpoint(self.step), run.summary or {}
        left_earlier = not self.step and checkpoint.step == summary.get("model_step") != summary.get("steps")
        if left_earlier or run.weights(checkpoint.step) == AVERAGE:
            best = ", the lowest validation loss" if left_earlier else ""
            print(f"pretrain: {run.model_in_words(checkpoint)}{best}", file=sys.stderr)
        model = run.load_model(device, checkpoint)
        # On a CPU fp32, in which a text is the same in any batch; elsewhere bf16 for its speed.
        model.activation_dtype = choose_precision("fp32" if device.type == "cpu" else "auto", device).dtype
        tokenizer, options, context = run.tokenizer(), vars(self.options), model.config.context_length

        def warn_if_long(prompt: str) -> None:
            if (tokens := len(encode_prompt(tokenizer, prompt))) > context:
                print(
                    f"pretrain: the prompt has {tokens:,} tokens; the model sees the last {context:,}", file=sys.stderr
                )

        def answer(prompt: str, number: int = 0) -> Iterator[str]:
            warn_if_long(prompt)
            return sample_text(model, tokenizer, prompt, **{**options, "seed": self.options.seed + number})

        if self.interactive:
            converse(answer)
        elif len(prompts) * self.num_samples == 1 and not self.json:
            pieces = answer(prompts[0])  # a prompt that cannot be encoded is refused before anything is printed
            print_as_it_comes(prompts[0], pieces)
        else:
            for prompt in prompts:
                warn_if_long(prompt)
            for number, text in enumerate(sample_texts(model, tokenizer, prompts, self.num_samples, **options)):
                if self.json:
                    print(json.dumps(asdict(text), ensure_ascii=False), flush=True)
                else:
                    which, index = divmod(number, self.num_samples)
                    print(f"--- prompt {which + 1}, sample {index + 1}, seed {text.seed} ---")
                    print(f"{text.prompt}{text.text}", flush=True)
        return 0
