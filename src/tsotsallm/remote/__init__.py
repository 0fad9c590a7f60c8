"""Models of the Hugging Face hub that are read where they are: by range requests, into a bounded cache on disk."""
