"""The figure of implied value: what it draws, and its files. Its shapes: tests/losses/properties.py, the tenth."""

import numpy as np
import pytest

from kto_jax import curves

CURVES = {curve.name: curve for curve in curves.CURVES}


def drawn(name):
    return curves.points(CURVES[name])


def test_the_figure_has_people_and_the_four_losses_all_through_zero():
    assert set(CURVES) == {"Kahneman–Tversky", "KTO", "DPO", "SLiC", "PPO-Clip"}
    for name in CURVES:
        z, value = drawn(name)
        assert value[np.flatnonzero(z == 0).item()] == 0


def test_people_and_kto_differ_in_their_aversion_to_losses():
    for name, aversion in (("Kahneman–Tversky", 2.25), ("KTO", 1.0)):
        z, value = drawn(name)
        loss, gain = (np.argmin(np.abs(z - at)) for at in (-1.5, 1.5))
        assert z[loss] == pytest.approx(-z[gain])
        assert -value[loss] / value[gain] == pytest.approx(aversion, rel=1e-5)


def test_the_figure_is_written_as_png_and_svg(tmp_path):
    png, svg = curves.write(tmp_path / "new" / "curves")
    assert png.name == "curves.png"
    assert png.read_bytes().startswith(b"\x89PNG")
    assert 5_000 < png.stat().st_size < 100_000
    assert svg.name == "curves.svg"
    assert svg.read_text().count("<path") > len(CURVES)
