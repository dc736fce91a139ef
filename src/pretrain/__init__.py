"""Pretrain GPT-style language models from raw text."""
