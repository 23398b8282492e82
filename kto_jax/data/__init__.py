"""From rows of feedback to packed batches, without devices or models."""
