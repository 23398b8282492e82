import pytest

from benchmarks import loss_errors
from tests.losses.properties import PROPERTIES


@pytest.mark.parametrize("name", PROPERTIES)
def test_the_property_holds(name):
    holds, measured = PROPERTIES[name]()
    assert holds, measured


def test_there_are_ten():
    assert [name.split()[0] for name in PROPERTIES] == [str(number) for number in range(1, 11)]


@pytest.mark.parametrize("holds, code, said", [(True, 0, "All 1 hold"), (False, 1, "Do not hold: 1 truth")])
def test_the_command_prints_what_was_measured_and_fails_where_a_property_does(monkeypatch, capsys, holds, code, said):
    monkeypatch.setattr(loss_errors, "CASES", {"sft": loss_errors.CASES["sft"]})
    monkeypatch.setattr(loss_errors, "PROPERTIES", {"1 truth": lambda: (holds, "measured 4.2")})
    assert loss_errors.main() == code
    printed = capsys.readouterr().out
    assert "measured 4.2" in printed
    assert said in printed


def test_the_command_fails_where_a_loss_is_off(monkeypatch, capsys):
    monkeypatch.setattr(loss_errors, "CASES", {"sft": loss_errors.CASES["sft"]})
    monkeypatch.setattr(loss_errors, "PROPERTIES", {})
    monkeypatch.setattr(loss_errors, "errors", lambda case: (1e-3, 0.0))
    assert loss_errors.main() == 1
    assert "Missed: sft" in capsys.readouterr().out
