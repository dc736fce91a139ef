"""How fast text is made: pretrain with its cache, pretrain without, and transformers' generate, in one run.

    python benchmarks/generate.py [--dtype bf16] [--layers 6 --width 384 --context 1024] [--tokens 512]

All hold the same Llama-like model with the same weights, and continue the same prompts greedily by the same number of
tokens. One line for each: tokens per second, the best of some rounds taken in turn, for one row and for a batch.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pretrain.config import ModelConfig
from pretrain.device import DTYPES
from pretrain.generation import SamplingOptions, generate
from pretrain.model import GPT
from pretrain.model.packed import for_inference

Generate = Callable[[GPT, Tensor, int], list[list[int]]]


def clock() -> float:
    """Seconds; with one thread those of the processor, which other work on the machine does not change."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def build(args: argparse.Namespace) -> GPT:
    config = ModelConfig(
        layers=args.layers, heads=args.width // 64, width=args.width, context_length=args.context, mlp="swiglu",
        norm_weight=True, qk_norm=False, embedding_norm=False, logit_softcap=0.0, init="gpt2",
    )  # fmt: skip
    model = GPT(config, args.vocab)
    model.init_weights(torch.Generator().manual_seed(0))
    model.activation_dtype = DTYPES[args.dtype]
    return model.to(args.device).eval()


def cached(model: GPT, prompts: Tensor, tokens: int) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in prompts]
    for row, token in generate(model, prompts.tolist(), SamplingOptions(max_tokens=tokens, temperature=0)):
        rows[row].append(token)
    return rows


@torch.inference_mode()
def uncached(model: GPT, prompts: Tensor, texts: list[list[int]], every: int) -> float:
    """Seconds that the tokens of ``texts`` take when each is made from the whole text before it, anew.

    One step in ``every`` is timed and counted for all, since this takes minutes; each must choose the same token.
    """
    model = for_inference(model)  # the same cast weights: only the cache is missing
    whole = torch.cat((prompts, torch.tensor(texts, device=prompts.device)), dim=1)
    steps = range(prompts.shape[1] + every // 2, whole.shape[1], every)
    model(whole[:, : steps[0]], last_only=True)  # warm
    same, start = 0, clock()
    for step in steps:
        same += int((model(whole[:, :step], last_only=True)[:, -1].argmax(-1) == whole[:, step]).sum())
    seconds = (clock() - start) * len(texts[0]) / len(steps)
    if same < 0.99 * len(prompts) * len(steps) and model.activation_dtype == torch.float32:
        raise SystemExit("with and without the cache the tokens differ")
    return seconds


def transformers_generate(model: GPT) -> Generate | None:
    """The Llama of transformers with the weights of ``model``; None where transformers is not installed."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        return None
    config, mlp = model.config, model.blocks[0].mlp
    with torch.device(model.embedding.weight.device):
        theirs: Any = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=model.vocab_size, hidden_size=config.width, intermediate_size=mlp.up.out_features,  # type: ignore[union-attr]
                num_hidden_layers=config.layers, num_attention_heads=config.heads,
                num_key_value_heads=config.kv_heads or config.heads, rms_norm_eps=config.norm_eps,
                max_position_embeddings=config.context_length, bos_token_id=None, eos_token_id=None, pad_token_id=0,
            )
        )  # fmt: skip
    theirs.load_state_dict(llama_weights(model))
    theirs = theirs.to(model.activation_dtype).eval()

    def run(_: GPT, prompts: Tensor, tokens: int) -> list[list[int]]:
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            whole = theirs.generate(
                prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=tokens, do_sample=False
            )  # fmt: skip
        return whole[:, prompts.shape[1] :].tolist()

    return run


def llama_weights(model: GPT) -> dict[str, Tensor]:
    """The weights of a Llama-like model under transformers' names."""
    names = {
        "embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head",
        "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
        "attention.q": "self_attn.q_proj", "attention.k": "self_attn.k_proj", "attention.v": "self_attn.v_proj",
        "attention.out": "self_attn.o_proj",
        "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj",
    }  # fmt: skip
    weights = {}
    for name, value in model.state_dict().items():
        module = name.removesuffix(".weight")
        if module.startswith("blocks."):
            _, layer, part = module.split(".", 2)
            weights[f"model.layers.{layer}.{names[part]}.weight"] = value
        else:
            weights[f"{names[module]}.weight"] = value
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description="How fast text is made: pretrain and transformers.")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--prompt", type=int, default=16, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=512, help="tokens to make in each row")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3, help="in turn; of each the best counts")
    parser.add_argument("--uncached-every", type=int, default=32, help="without the cache one step in so many is timed")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    assert args.prompt + args.tokens <= args.context, "transformers has no rule for what lies beyond the context"

    model = build(args)
    theirs = transformers_generate(model)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{parameters:.1f} million parameters, {args.tokens} tokens a row, {args.dtype}, {args.device}", end=", ")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for batch in args.batch:
        prompts = torch.randint(args.vocab, (batch, args.prompt), generator=torch.Generator().manual_seed(1))
        prompts = prompts.to(args.device)
        best: dict[str, float] = {}
        texts: dict[str, list[list[int]]] = {}
        for _ in range(args.rounds):
            for name, run in (("pretrain", cached), ("transformers", theirs)):
                if run is None:
                    continue
                run(model, prompts, 4)  # warm
                start = clock()
                texts[name] = run(model, prompts, args.tokens)
                best[name] = min(best.get(name, float("inf")), clock() - start)
            seconds = uncached(model, prompts, texts["pretrain"], args.uncached_every)
            best["pretrain, no cache"] = min(best.get("pretrain, no cache", float("inf")), seconds)
        for name, seconds in best.items():
            print(
                f"batch {batch:<3} {name:<20} {batch * args.tokens / seconds:8.1f} tokens/s   "
                f"pretrain is {seconds / best['pretrain']:6.2f} x as fast"
            )
        if "transformers" in texts:
            same = int((torch.tensor(texts["transformers"]) == torch.tensor(texts["pretrain"])).sum())
            print(f"batch {batch:<3} tokens equal to those of transformers: {same} of {batch * args.tokens}")


if __name__ == "__main__":
    main()
