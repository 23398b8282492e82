"""The index: tokenized feedback on disk."""
