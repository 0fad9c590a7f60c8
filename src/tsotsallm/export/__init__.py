"""Results in the formats that other engines run: GGUF and plain Hugging Face."""
