"""Puts the recipes of configs/ into the package, as kto_jax.recipes."""

from pathlib import Path

from setuptools import find_packages, setup

RECIPES = [str(path.relative_to("configs")) for path in sorted(Path("configs").rglob("*")) if path.is_file()]

setup(
    packages=[*find_packages(include=["kto_jax*"]), "kto_jax.recipes"],
    package_dir={"kto_jax.recipes": "configs"},
    package_data={"kto_jax.recipes": [name for name in RECIPES if "__pycache__" not in name]},
)
