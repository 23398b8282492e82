"""KTO: align language models from thumbs-up and thumbs-down, on TPU and GPU."""

__version__ = "0.1.0"
