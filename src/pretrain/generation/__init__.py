"""Text from a model.

    prompts → decode.generate (one KV cache for all rows) → sampling.choose → text.TextWriter → sample.sample_text

Names are imported when first used: ``options`` alone, which the command line shows, needs no torch.
"""

from typing import TYPE_CHECKING, Any

from pretrain.generation.options import SamplingOptions

if TYPE_CHECKING:
    from pretrain.generation.decode import generate
    from pretrain.generation.sample import encode_prompt, sample_text, sample_texts

__all__ = ["SamplingOptions", "encode_prompt", "generate", "sample_text", "sample_texts"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'pretrain.generation' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(f"pretrain.generation.{'decode' if name == 'generate' else 'sample'}"), name)
