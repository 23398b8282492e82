"""From rows of feedback to packed batches; no devices, no model."""
