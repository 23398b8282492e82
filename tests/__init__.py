"""The tests, in the folders of the package."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
"""The checkout."""
TINY_MODEL = ROOT / "configs" / "tiny_model"
