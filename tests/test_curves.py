"""The figure of implied value: its shape by numbers, and its files."""

import numpy as np
import pytest

from kto_jax import curves

CURVES = {curve.name: curve for curve in curves.CURVES}
# Second differences of 401 float32 points; below this they are rounding.
ROUNDING = 2e-6


def drawn(name):
    z, value = curves.points(CURVES[name])
    return z, value, np.diff(value), np.diff(value, 2)


def test_the_figure_has_people_and_the_four_losses_all_through_zero():
    assert set(CURVES) == {"Kahneman–Tversky", "KTO", "DPO", "SLiC", "PPO-Clip"}
    for name in CURVES:
        z, value, *_ = drawn(name)
        assert value[np.flatnonzero(z == 0).item()] == 0


@pytest.mark.parametrize("name", ["Kahneman–Tversky", "KTO", "DPO"])
def test_more_is_always_better(name):
    assert np.all(drawn(name)[2] > 0)


@pytest.mark.parametrize("name", ["SLiC", "PPO-Clip"])
def test_more_is_never_worse(name):
    _, _, first, _ = drawn(name)
    assert np.all(first >= 0)
    assert np.any(first > 0)


@pytest.mark.parametrize("name", ["Kahneman–Tversky", "KTO"])
def test_people_and_kto_are_averse_to_risk_in_gains_and_seek_it_in_losses(name):
    z, _, _, second = drawn(name)
    middle = z[1:-1]
    # The step across 0 itself belongs to neither side.
    assert np.all(second[middle > 0.01] < ROUNDING)
    assert np.all(second[middle < -0.01] > -ROUNDING)
    assert np.sum(second[middle > 0.01]) < -100 * ROUNDING
    assert np.sum(second[middle < -0.01]) > 100 * ROUNDING


def test_dpo_is_averse_to_risk_throughout():
    _, _, first, second = drawn("DPO")
    assert np.all(second < ROUNDING)
    assert first[0] > 10 * first[-1]


def test_people_and_kto_differ_in_their_aversion_to_losses():
    for name, aversion in (("Kahneman–Tversky", 2.25), ("KTO", 1.0)):
        z, value, *_ = drawn(name)
        loss, gain = (np.argmin(np.abs(z - at)) for at in (-1.5, 1.5))
        assert z[loss] == pytest.approx(-z[gain])
        assert -value[loss] / value[gain] == pytest.approx(aversion, rel=1e-5)


def test_slic_and_ppo_clip_are_flat_beyond_their_limits_and_only_there():
    for name, limit in (("SLiC", 1.0), ("PPO-Clip", np.log(1.2))):
        z, _, first, _ = drawn(name)
        assert not np.any(first[z[:-1] > limit])
        assert np.all(first[z[1:] < limit] > 0)


def test_the_figure_is_written_as_png_and_svg(tmp_path):
    png, svg = curves.write(tmp_path / "new" / "curves")
    assert png.name == "curves.png"
    assert png.read_bytes().startswith(b"\x89PNG")
    assert 5_000 < png.stat().st_size < 100_000
    assert svg.name == "curves.svg"
    assert svg.read_text().count("<path") > len(CURVES)
