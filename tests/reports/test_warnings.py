"""What a report warns of, and at which steps."""

from kto_jax.reports.warnings import find_warnings


def rows(losses, **more):
    return [{"step": step, "loss": loss, **{name: values[step] for name, values in more.items()}}
            for step, loss in enumerate(losses)]  # fmt: skip


def test_a_quiet_run_has_no_warnings():
    assert find_warnings(rows([0.5, 0.49, 0.51] * 20), 10) == ([], [])


def test_spikes_and_steps_that_were_not_finite_are_marked():
    losses = [0.5, 0.49, 0.51] * 20
    losses[40] = 3.0
    found, marks = find_warnings(rows(losses, num_bad_steps=[int(step in (7, 8)) for step in range(60)]), 10)
    assert marks == [7, 8, 40]
    assert "not finite at steps 7, 8;" in found[0] and "at step 40:" in found[1]
    assert find_warnings(rows(losses), 0) == ([], [])


def test_overfitting_names_the_best_step():
    evaluated = [{"step": step, "eval_loss": loss} for step, loss in ((10, 0.5), (20, 0.4), (30, 0.45))]
    (found,), _ = find_warnings(evaluated, 10)
    assert "lowest at step 20 (0.4) and rose to 0.45" in found


def test_saturation_at_the_end_is_told():
    (found,), marks = find_warnings(rows([0.5] * 30, saturated=[0.1] * 20 + [0.8] * 10), 10)
    assert found.startswith("80 % of the examples of the last steps were saturated") and marks == []
