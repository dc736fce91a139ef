"""The generation room: text from a model."""

from pretrain.generation.sample import generate, sample_text

__all__ = ["generate", "sample_text"]
