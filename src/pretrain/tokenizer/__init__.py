"""Text to token ids and back, exactly to the byte; how many bytes each token stands for.

    build_tokenizer(kind, vocab_size, texts) ──> Tokenizer ──> encode, encode_documents ──> ids
      bpe   trained here                            │          decode, decode_bytes    <── ids
      char  the characters of the texts             │          token_bytes             ──> bits per byte
      byte  the 256 bytes                           │
      gpt2  OpenAI's 50,257 tokens                  └─ save / load: always a standard tokenizer.json
      PATH  any byte-level tokenizer.json

``tokenizer.py`` has the class and its checks of a tokenizer.json, ``build.py`` makes a tokenizer of each kind,
``gpt2.py`` finds the published vocabulary, ``patterns.py`` has the regexes that cut words and the byte alphabet,
``fast.py`` encodes many times faster than the library that defines the ids.
"""

from pretrain.tokenizer.build import build_tokenizer
from pretrain.tokenizer.gpt2 import local_gpt2_tokenizer
from pretrain.tokenizer.tokenizer import Tokenizer
