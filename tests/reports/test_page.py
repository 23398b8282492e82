"""The report has every section, escapes all text, and can be written for a run without steps."""

import html.parser
import math
import re

import numpy as np
import pytest

from kto_jax.reports.page import Report, render_report, write_report

EVIL = "<script>alert('x')</script> & \"quoted\""


def metrics(num_steps=40):
    rows = []
    for step in range(num_steps):
        row = {
            "step": step,
            "loss": 0.5 - 0.001 * step,
            "rewards_desirable": 0.01 * step,
            "rewards_undesirable": -0.01 * step,
            "margin": 0.02 * step,
            "auc": 0.5,
            "accuracy": 0.5,
            "kl": 0.1,
            "kl_standard_error": 0.05,
            "z0": 0.1,
            "grad_norm": 1.0,
            "saturated": 0.0,
            "learning_rate": 1e-5,
            "tokens_per_second": 100.0,
            "examples": 16,
            "tokens": 1000,
            "seconds": 15.25,
        }
        rows.append(row)
    return rows


def render(**changes):
    """The HTML of a complete report."""
    return render_report(make_report(**changes))


def make_report(**changes):
    values = {
        "title": "a run",
        "command": "python -m kto_jax.train",
        "config": {"seed": 0, "objective": {"beta": 0.1}},
        "manifest": {
            "accepted": 97,
            "rejections": {"histogram": {"completion is empty": 1, "label is missing": 4}, "first": []},
        },
        "metrics": metrics(),
        "samples": [{"prompt": "Review it.", "before": "A triumph.", "after": "A mess."}],
        "verdicts": [{"judge": "feedback", "figure": "judged desirable (share)", "before": 0.17, "after": 0.87}],
    }
    return Report(**(values | changes))


class Tags(html.parser.HTMLParser):
    """Collects tags and identifiers and checks that every opened tag is closed."""

    VOID = frozenset({"meta", "br", "link", "img", "input", "path", "use", "circle", "rect", "line"})

    def __init__(self, text):
        super().__init__()
        self.names, self.identifiers, self.addresses, self.open = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.names.append(tag)
        self.identifiers += [value for name, value in attributes if name == "id"]
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href", "srcset")]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_every_section_is_rendered():
    text = render()
    for expected in (
        "a run",
        "python -m kto_jax.train",
        "triumph.</del>",
        "mess.</ins>",
        "label is missing",
        "objective.beta",
    ):
        assert expected in text
    for title in ("Loss", "Rewards", "Distance from the reference", "Gradient norm", "Learning rate", "Speed"):
        assert f"<h3>{title}</h3>" in text
    assert text.count("<svg ") == 9  # and the lengths of the samples
    assert "▲ 70 points" in text


def test_the_page_is_well_formed_and_needs_nothing_from_outside():
    tags = Tags(render())
    assert tags.open == []
    assert tags.addresses, "the curves refer to their own markers and clip paths"
    assert all(address.startswith("#") for address in tags.addresses)
    assert not {"link", "img", "iframe"} & set(tags.names)
    assert tags.names.count("script") == 1  # the page's own search
    assert "default-src &#39;none&#39;" in render()
    assert len(tags.identifiers) == len(set(tags.identifiers))
    assert {address[1:] for address in tags.addresses} <= set(tags.identifiers)


def test_clip_paths_of_the_curves_are_found():
    text = render()
    used = set(re.findall(r"url\(#([^)]+)\)", text))
    assert used
    assert used <= set(Tags(text).identifiers)


def test_text_of_the_run_is_escaped():
    text = render(
        title=EVIL,
        command=EVIL,
        config={EVIL: EVIL},
        manifest={"rejections": {"histogram": {EVIL: 1}, "first": [{"place": EVIL, "reason": EVIL}]}},
        samples=[{"prompt": EVIL, "before": EVIL, "after": EVIL}],
        verdicts=[{"judge": EVIL, "figure": EVIL, "before": 0.1, "after": 0.2}],
        reference_error={EVIL: EVIL},
        figures={EVIL: EVIL},
        notes=[EVIL],
        about={EVIL: EVIL},
        compared_with=EVIL,
        differences=[(EVIL, EVIL, EVIL)],
    )
    assert text.count("<script") == 1
    assert text.count("&lt;script&gt;") >= 15
    assert Tags(text).open == []


def test_line_breaks_of_a_completion_are_kept():
    text = render(metrics=(), samples=[{"prompt": "p", "before": "one\n\ntwo", "after": ""}])
    assert '<div class="text">one\n\ntwo</div>' in text
    assert re.search(r"\.text \{[^}]*white-space: pre-wrap", text)
    assert "the completion is empty" in text


def test_chat_prompts_are_shown_by_turns():
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Review it."}]
    text = render(metrics=(), samples=[{"prompt": prompt, "before": "a", "after": "b"}])
    for role, said in (("system", "Be brief."), ("user", "Review it.")):
        assert f'<span class="tag">{role}</span><div class="text">{said}</div>' in text


def test_words_that_differ_are_marked_and_cut_samples_are_named():
    sample = {"prompt": "p", "before": "a good long film", "after": "a bad long film", "after_cut": True}
    text = render(metrics=(), samples=[sample])
    assert "a <del>good</del> long film" in text and "a <ins>bad</ins> long film" in text
    assert text.count("cut at the longest length</span>") == 1
    assert '<td data-name="After" class="number">100 %</td>' in text  # cut, of one sample


def test_the_head_says_what_changed_and_what_was_trained():
    verdict = {"judge": "feedback", "figure": "judged desirable (share)", "before": 0.2, "after": 0.8, "low": 0.4,
               "high": 0.7, "prompts": 40, "accuracy": 0.75}  # fmt: skip
    text = render(metrics=(), verdicts=[verdict], about={"model": "a model", "hardware": "1 × cpu"})
    assert "rose from 20 % to 80 %, by 60 points (95 % interval 40 to 70). It is not chance" in text
    assert "<dt>hardware</dt><dd>1 × cpu</dd>" in text
    assert '<span class="range">+40 to +70</span>' in text
    assert 'class="change unsure"' in render(metrics=(), verdicts=[verdict | {"low": -0.1}])


def test_warnings_are_told_and_marked_in_the_curves():
    rows = metrics(40)
    rows[30]["loss"], rows[12]["num_bad_steps"] = 5.0, 1
    text = render(metrics=rows)
    assert "The loss or gradient was not finite at step 12" in text
    assert "The loss was far above those before it at step 30" in text
    assert "mark the 2 steps of the warnings" in text


def test_the_steps_are_a_table_of_moderate_length_that_ends_with_the_last_one():
    text = render(metrics=metrics(1000))
    table = text[text.index("<summary>Steps") : text.index("</details>", text.index("<summary>Steps"))]
    assert "every 9th" in table and table.count("<tr>") == 1 + 112
    assert '<td class="number">999</td>' in table


def test_the_cost_is_in_time_and_tokens():
    text = render(num_devices=4)
    assert '<td data-name="Total" class="number">10 min 10 s</td>' in text
    assert '<td data-name="Total" class="number">0.678</td>' in text  # 610 s on 4 devices, in hours
    assert '<td data-name="Total" class="number">40,000</td>' in text


def test_lengths_and_splits_of_the_data_are_shown():
    manifest = {"splits": {"train": {"desirable": 5, "undesirable": 3, "prompts": 4}}}
    lengths = {"prompts": np.arange(9), "desirable": np.arange(5), "undesirable": np.arange(3)}
    text = render(metrics=(), manifest=manifest, lengths=lengths, samples=[])
    assert text.count("<svg ") == 2 and "Completions trained on" in text
    assert '<td data-name="Undesirable" class="number">3</td>' in text


def test_what_differs_from_the_recipe_is_listed():
    text = render(metrics=(), compared_with="the recipe tiny", differences=[("seed", "0", "3")])
    assert "What differs from the recipe tiny." in text and '<td data-name="Here"><code>3</code></td>' in text
    assert "Nothing differs from the recipe tiny." in render(metrics=(), compared_with="the recipe tiny")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 2000])
def test_runs_of_any_length_render(num_steps):
    text = render(metrics=metrics(num_steps))
    assert text.count("<svg ") == (9 if num_steps else 1)
    assert len(text) < 500_000
    assert f"<dd>{num_steps:,}</dd>" in text


def test_an_empty_run_renders():
    text = render_report(Report(title="t", command="c", config={}, manifest={}, metrics=[]))
    assert "No step was taken." in text
    assert "No samples were written" in text
    assert "No judges were configured" in text
    assert "No row was rejected." in text


def test_values_that_are_not_finite_or_missing_leave_a_gap():
    rows = metrics(10)
    rows[3]["loss"] = math.nan
    rows[4]["auc"] = None
    del rows[5]["kl_standard_error"]
    for row in rows:
        row["grad_norm"] = math.inf
    text = render(metrics=rows)
    assert "nan" not in text[text.index("<body>") :].lower()
    assert "<h3>Loss</h3>" in text
    assert "<h3>Gradient norm</h3>" not in text


def test_steps_repeated_after_a_resume_count_once_and_the_last_wins():
    repeated = [row | {"margin": 100.0} for row in metrics(20)[10:]]
    text = render(metrics=repeated + metrics(20))
    assert "<dd>20</dd>" in text
    assert "<dd>320</dd>" in text  # examples
    assert "<dd>0.37</dd>" in text  # margin: mean of the last two steps


def test_held_out_figures_are_shown_from_rows_of_their_own():
    rows = [*metrics(20), {"step": 19, "eval_loss": 0.4, "eval_margin": 1.25, "eval_auc": 0.75}]
    text = render(metrics=rows)
    assert "reward margin, held-out" in text
    assert "<dd>1.25</dd>" in text
    assert "<dd>0.75</dd>" in text
    assert "held-out AUC" in text  # in the curve's legend


def test_the_summary_adds_up_the_steps_and_takes_more_figures():
    text = render(figures={"perplexity": 14.256, "training time": "an age"})
    assert "<dt>examples</dt><dd>640</dd>" in text
    assert "<dt>tokens</dt><dd>40,000</dd>" in text
    assert "<dt>perplexity</dt><dd>14.3</dd>" in text
    assert "<dt>training time</dt><dd>an age</dd>" in text
    assert "10 min 10 s" in render()
    assert "17\N{NO-BREAK SPACE}%\N{NO-BREAK SPACE}→\N{NO-BREAK SPACE}87\N{NO-BREAK SPACE}%" in text


def test_a_verdict_without_a_before_or_after_shows_what_is_known():
    verdict = {"judge": "vader", "figure": "compound", "before": None, "after": -0.25}
    text = render(metrics=(), verdicts=[verdict])
    assert "-0.25" in text
    assert 'class="change"' not in text


def test_the_rejections_histogram_is_in_proportion_and_in_order():
    text = render(metrics=())
    assert text.index("label is missing") < text.index("completion is empty")
    assert "width:100.0%" in text
    assert "width:25.0%" in text


def test_the_same_run_gives_the_same_bytes_in_one_file(tmp_path):
    for name in ("one.html", "two.html"):
        write_report(tmp_path / name, make_report())
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.html", "two.html"]


def test_the_reference_error_is_shown_if_the_reference_was_rounded():
    errors = {"completions": 16.0, "logps_mean": 0.0551, "rewards_max": 0.022, "another_figure": 0.5}
    text = render(metrics=(), reference_error=errors)
    section = text[text.index('<section id="reference">') : text.index('<section id="data">')]
    for name, value in (
        ("log-probability, mean (nats)", "0.0551"),
        ("reward, largest", "0.022"),
        ("another_figure", "0.5"),
    ):
        assert re.search(rf"{re.escape(name)}</code></td><td><code>{value}</code>", section)
    assert 'id="reference"' not in render(metrics=())
