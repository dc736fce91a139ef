"""Train a small model on your own text in Python, then generate text with it.

python examples/train_in_python.py mybook.txt runs/mybook
"""

import sys

import pretrain


def main(text: str, out: str, **overrides: object) -> None:
    config = pretrain.load_config("quickstart", **{"data.paths": [text], **overrides})
    run = pretrain.train(config, out, pretrain.Console())
    assert run.summary is not None
    print(f"bits per byte on held-out text: {run.summary['val_bpb']:.3f}")

    model, tokenizer = run.load_model(), run.tokenizer()
    print("The ", end="")
    for piece in pretrain.sample_text(model, tokenizer, prompt="The ", max_tokens=100, seed=1):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:3])
