"""Hugging Face: checkpoints in and out, and the model file that exports take along."""
