"""Whole models that run: checkpoints in transformers, GGUF files in llama.cpp."""
