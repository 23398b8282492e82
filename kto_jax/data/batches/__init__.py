"""Which sequences each step reads, and how they are packed."""
