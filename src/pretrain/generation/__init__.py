"""Text from a model.

prompts → decode.generate (one KV cache for all rows) → sampling.choose → text.TextWriter → sample.sample_text
"""

from pretrain.config.sampling import SamplingOptions
from pretrain.generation.decode import generate
from pretrain.generation.sample import encode_prompt, sample_text, sample_texts
