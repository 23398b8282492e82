"""Evaluates a policy: held-out figures, and win rates against a baseline, each with its interval.

python -m kto_jax.evaluate --run=runs/mine --judge=feedback
python -m kto_jax.evaluate --run=runs/mine --prompts=prompts.jsonl --judge="max_words(15)" --steps=all
python -m kto_jax.evaluate --model=runs/mine --against=Qwen/Qwen2.5-0.5B-Instruct --prompts=prompts.jsonl \\
  --judge=http://127.0.0.1:8000/v1
python -m kto_jax.evaluate --model=outputs_a.json --against=outputs_b.json --judge=judges.py:compare

Loss, accuracy, AUC and calibration need the feedback that a run held out (--run). Both models complete the prompts of
--prompts, or the run's held-out ones, with equal sampling. --out gets evaluation.html, evaluation.json and the files of
AlpacaEval. docs/evaluate.md explains the figures and lists the judges.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from kto_jax.progress import announce_import

if __name__ == "__main__":  # The imports below take seconds.
    announce_import()

from kto_jax.command import FINISHED, run_command
from kto_jax.config import ConfigError, DataConfig
from kto_jax.config.packages import is_installed, require
from kto_jax.config.ranges import Count, NotNegative, Positive, Precision, Range, Seed
from kto_jax.data.tokens.transcript import read_turns
from kto_jax.devices.compilation import keep_compiled
from kto_jax.devices.gpu_memory import use_most_gpu_memory
from kto_jax.devices.inference import Devices, report_devices
from kto_jax.evaluation.alpaca_eval import align, is_outputs, read_outputs, write_annotations, write_outputs
from kto_jax.evaluation.completions import Answer, Task, answer, measure_divergence, same_tokens
from kto_jax.evaluation.contest import Contest, conclusion, finite, hold_contest, to_json
from kto_jax.evaluation.llm_judge import INSTRUCTIONS, Endpoint, estimate_cost
from kto_jax.evaluation.pair_judges import PairJudge, open_judges
from kto_jax.evaluation.runs import HeldOut, OpenRun, open_run
from kto_jax.progress import ProgressBar, next_lines, show_progress
from kto_jax.rollouts.prompts import PromptRow, read_prompts
from kto_jax.sampling.complete import LanguageModel, open_language_model
from kto_jax.sampling.sample import Sampling
from kto_jax.storage.atomic import write_json
from kto_jax.storage.bucket import is_bucket


@dataclasses.dataclass(frozen=True)
class Options:
    """Flags of the command."""

    run: str = ""
    """The folder of a run, also in a bucket: its checkpoints are evaluated."""
    model: str = ""
    """In place of --run: any model that kto_jax.generate takes, or a file of outputs as AlpacaEval has them."""
    step: str = "last"
    """Checkpoint of --run: "last", "best" or a number."""
    steps: str = ""
    """In place of --step: "all", or numbers separated by commas; each is evaluated, as a curve."""
    against: str = "reference"
    """The baseline: "reference" (the model that --run started from), or what --model takes."""
    prompts: str = ""
    """A file of prompts, in any format that training reads. Default with --run: its held-out prompts."""
    prompt_field: str = "prompt"
    """Field with the prompt: text or chat messages."""
    max_prompts: Annotated[int, Range(at_least=0, zero="all")] = 200
    """Complete at most this many prompts, the first ones."""
    judge: tuple[str, ...] = ()
    """A judge, as docs/evaluate.md lists them; may be given several times."""
    tie: NotNegative = 0.0
    """For judges that score: scores that differ by at most this much are a tie."""
    judge_model: str = ""
    """Name of the judge's model at its URL."""
    judge_instructions: str = ""
    """File with what a language model as judge is told; it must ask for [[A>B]], [[B>A]] or [[A=B]]. Default: ours."""
    judge_max_tokens: Count = 512
    """Longest answer of a language model as judge."""
    judge_price: str = ""
    """Its price in dollars for a million tokens in and out, as in "2.5,10"; without it, only tokens are shown."""
    judge_parallel: Count = 8
    """Questions asked at once."""
    judge_timeout: Positive = 120.0
    """Seconds that an answer, or a reward function, may take."""
    yes: bool = False
    """Ask a language model as judge; without it, the command shows the cost and stops."""
    num_samples: Count = 1
    """Completions of each prompt by each model."""
    max_new_tokens: Count = 256
    """Longest completion, in tokens."""
    temperature: Annotated[float, Range(at_least=0, zero="greedy")] = 1.0
    """Divides the logits. The distance from the baseline is a KL only at 1."""
    seed: Seed = 0
    """Seed of the sampling."""
    batch_size: Count = 16
    """Completions sampled at once."""
    devices: Devices = "auto"
    """The devices that complete prompts: "one", "all" of this machine, or "auto": all if they are no CPUs. A run's
    held-out feedback is measured on one."""
    dtype: Precision = "float32"
    """Dtype of the computation of --model, --against and reward models."""
    chat_template: str = "auto"
    """Of --model: "auto" for the tokenizer's own, "none" for plain text, or the path of a Jinja file."""
    out: str = ""
    """Folder to write. Default: RUN/evaluation, or evaluation."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 2 if a flag, a prompt, a model or a judge cannot be used."""
    return run_command(evaluate, Options, str(__doc__), arguments)


def evaluate(options: Options) -> int:
    """Evaluates, writes the files and prints what they say.

    Raises:
      ConfigError: a flag, a prompt, a model or a judge cannot be used.
      TransientError: a judge cannot be reached for now; its answers so far are kept.
    """
    prices = _check(options)
    out = Path(options.out or (Path(options.run) / "evaluation" if options.run else "evaluation"))
    keep_compiled()
    use_most_gpu_memory()
    with contextlib.ExitStack() as stack:
        shown = stack.enter_context(contextlib.ExitStack())
        progress = shown.enter_context(show_progress(logs=True))
        progress.start("reading models and feedback")
        run = stack.enter_context(open_run(options.run, devices=options.devices)) if options.run else None
        if run is not None:
            report_devices(run.placed)
        work = _Evaluation(options, run, out, progress)
        steps = work.chosen_steps()
        task = work.read_task() if options.judge or options.prompts else None
        if task is not None and not _may_ask(options, task, prices, len(steps)):
            return FINISHED
        held_out = work.measure_held_out(steps)
        if task is None and not held_out:
            raise ConfigError(
                f"--run={options.run} held out no feedback (config.data.holdout and config.data.eval), and no --judge "
                "is given: there is nothing to measure. Allowed: one of the two. Set --judge and --prompts."
            )
        contests = work.hold_contests(task, steps) if task is not None else []
        shown.close()
        work.write(held_out, contests)
    return FINISHED


@dataclasses.dataclass(frozen=True)
class _Side:
    """One side of a contest: its completions, its name, and its model unless the completions were read from a file."""

    answers: list[Answer]
    name: str
    model: LanguageModel | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class _Evaluation:
    """One evaluation: its flags, its run if there is one, the folder it writes, and what shows its progress."""

    options: Options
    run: OpenRun | None
    out: Path
    progress: ProgressBar

    def chosen_steps(self) -> list[int | None]:
        """The checkpoints to evaluate; None stands for --model."""
        if self.run is None:
            return [None]
        if not self.options.steps:
            return [self.run.find_step(self.options.step)]
        if self.options.steps == "all":
            return list(self.run.steps)
        return [self.run.find_step(step.strip()) for step in self.options.steps.split(",")]

    def read_task(self) -> Task:
        """What both models complete."""
        options = self.options
        sampling = Sampling(options.temperature, 1.0, 0, options.max_new_tokens)
        how: dict[str, Any] = {
            "sampling": sampling, "num_samples": options.num_samples, "seed": options.seed,
            "batch_size": options.batch_size,
        }  # fmt: skip
        if options.prompts:
            kept, _ = read_prompts(DataConfig(train=options.prompts, prompt_field=options.prompt_field, holdout=0.0))
            return Task(kept[: self._count(len(kept))], **how)
        if self.run is None:
            return Task([], **how)  # outputs are read from files
        ids = self.run.held_out_prompts(sys.maxsize)
        if not ids:
            raise ConfigError(
                f"--run={options.run} held out no prompts (config.data.holdout), and --prompts is not given. Judges "
                "need prompts. Set --prompts, or take --judge out."
            )
        ids, tokenizer = ids[: self._count(len(ids))], self.run.inputs.tokenizer
        rows = [PromptRow(read_turns(tokenizer, one), {}, f"held-out prompt {n}") for n, one in enumerate(ids, start=1)]
        return Task(rows, ids=ids, **how)

    def _count(self, found: int) -> int:
        """How many of the prompts are completed; says so if that is not all."""
        count = min(found, self.options.max_prompts or found)
        if count < found:
            print(f"completes the first {count} of {found} prompts; --max_prompts=0 takes all", file=sys.stderr)
        return count

    def measure_held_out(self, steps: Sequence[int | None]) -> list[HeldOut]:
        """Figures on the feedback that the run held out, for each step."""
        found = []
        for step in steps:
            if self.run is not None and step is not None:
                self.progress.start(f"measuring step {step}")
                figures = self.run.held_out(step)
                found += [figures] if figures else []
        return found

    def hold_contests(self, task: Task, steps: Sequence[int | None]) -> list[Contest]:
        """The evaluated models against the baseline."""
        options = self.options
        endpoint = Endpoint(
            model=options.judge_model, instructions=_instructions(options), max_tokens=options.judge_max_tokens,
            parallel=options.judge_parallel, timeout=options.judge_timeout,
        )  # fmt: skip
        feedback = self.run.feedback_judge if self.run else None
        how: dict[str, Any] = {"tie": options.tie, "dtype": options.dtype, "timeout": options.judge_timeout}
        with contextlib.ExitStack() as stack:
            judges = stack.enter_context(open_judges(options.judge, feedback=feedback, endpoint=endpoint, **how))
            theirs = self._baseline(task, stack)
            contests = []
            for step in steps:
                # One checkpoint after the other: memory holds the baseline and one of them.
                ours = self._evaluated(task, step, stack)
                self._write_outputs(ours, theirs, step if len(steps) > 1 else None)
                contests.append(self._hold(ours, theirs, step, judges))
        return contests

    def _hold(self, ours: _Side, theirs: _Side, step: int | None, judges: Sequence[PairJudge]) -> Contest:
        self.progress.start(f"judging {ours.name}")
        divergence, notes = None, []
        if ours.model is not None and theirs.model is not None:
            if same_tokens(ours.model, theirs.model):
                divergence = measure_divergence(ours.answers, theirs.model)
            else:
                notes.append(
                    f"{ours.name} and {theirs.name} have different tokenizers: their distance cannot be measured."
                )
        aligned = align(ours.answers, theirs.answers)
        contest = hold_contest((ours.name, theirs.name), step, ours.answers, aligned, judges, divergence)
        return dataclasses.replace(contest, notes=[*contest.notes, *notes])

    def _baseline(self, task: Task, stack: contextlib.ExitStack) -> _Side:
        if self.options.against == "reference":
            assert self.run is not None, "_check refuses this"
            return self._complete(self.run.language_model(None), task, "the reference")
        return self._open(self.options.against, "--against", task, stack)

    def _evaluated(self, task: Task, step: int | None, stack: contextlib.ExitStack) -> _Side:
        if self.run is None or step is None:
            return self._open(self.options.model, "--model", task, stack)
        return self._complete(self.run.language_model(step), task, f"{self.run.name} after {step} steps")

    def _open(self, path: str, flag: str, task: Task, stack: contextlib.ExitStack) -> _Side:
        if is_outputs(path):
            return _Side(*read_outputs(path))
        if not task.rows:
            raise ConfigError(
                f"{flag}={path} is a model, and there are no prompts for it to complete. Allowed: --prompts, --run "
                "with held-out prompts, or files of outputs on both sides. Set --prompts."
            )
        template = self.options.chat_template if flag == "--model" else "auto"
        how: dict[str, Any] = {"dtype": self.options.dtype, "devices": self.options.devices}
        model = stack.enter_context(open_language_model(path, chat_template=template, **how))
        own = dataclasses.replace(task, ids=())  # another tokenizer may have another vocabulary
        return self._complete(model, own, Path(path).name if Path(path).exists() else path)

    def _complete(self, model: LanguageModel, task: Task, name: str) -> _Side:
        if self.run is None or model.placed is not self.run.placed:
            report_devices(model.placed)
        self.progress.start(f"completing prompts by {name}", total=len(task.rows) * task.num_samples)
        return _Side(answer(model, task, on_batch=self.progress.advance), name, model)

    def _write_outputs(self, ours: _Side, theirs: _Side, step: int | None) -> None:
        """Writes the completions before they are judged, which may fail."""
        self.out.mkdir(parents=True, exist_ok=True)
        dataset = Path(self.options.prompts).stem if self.options.prompts else "held-out prompts"
        write_outputs(self.out / f"outputs_evaluated{_suffix(step)}.json", ours.answers, ours.name, dataset)
        write_outputs(self.out / "outputs_baseline.json", theirs.answers, theirs.name, dataset)

    def write(self, held_out: Sequence[HeldOut], contests: Sequence[Contest]) -> None:
        """Writes all files and prints the outcome."""
        self.out.mkdir(parents=True, exist_ok=True)
        sentences = [
            conclusion(one.judgement.judge, contest.evaluated, contest.baseline, one)
            for contest in contests
            for one in contest.judged
        ]
        record = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": {f.name: getattr(self.options, f.name) for f in dataclasses.fields(self.options)},
            "held_out": [dataclasses.asdict(one) for one in held_out],
            "contests": [to_json(contest) for contest in contests],
            "conclusions": sentences,
        }
        write_json(self.out / "evaluation.json", finite(record))
        for contest in contests:
            write_annotations(
                self.out / f"annotations{_suffix(contest.step if len(contests) > 1 else None)}.json",
                [one.judgement for one in contest.judged], contest.ours, contest.theirs,
                (contest.evaluated, contest.baseline),
            )  # fmt: skip
        if is_installed("matplotlib"):
            from kto_jax.reports.evaluation_page import write_evaluation_page

            write_evaluation_page(self.out / "evaluation.html", held_out, contests, dataclasses.asdict(self.options))
        else:
            print("evaluation.html is skipped: it needs matplotlib. Run pip install matplotlib.", file=sys.stderr)
        for line in [*map(_line, held_out), *sentences]:
            print(line)
        for note in dict.fromkeys(note for contest in contests for note in contest.notes):
            print(f"note: {note}")
        print(f"see {self.out}/evaluation.html" if is_installed("matplotlib") else f"see {self.out}/evaluation.json")
        model = self.options.run or self.options.model
        if not is_outputs(model):
            print(
                "\n".join(next_lines(f"chat --model={model}", *([f"export --run={model}"] if self.options.run else [])))
            )


def _suffix(step: int | None) -> str:
    return "" if step is None else f"_{step}"


def _line(figures: HeldOut) -> str:
    text = f"step {figures.step}: held-out loss {figures.loss:.4f} over {figures.examples} examples"
    if figures.ranking:
        accuracy = figures.ranking.accuracy
        text += f", accuracy {100 * accuracy.value:.0f} % ({100 * accuracy.low:.0f} to {100 * accuracy.high:.0f} %)"
    return f"{text}, AUC {figures.auc.value:.2f} ({figures.auc.low:.2f} to {figures.auc.high:.2f})"


def _check(options: Options) -> tuple[float, float] | None:
    """Refuses flags that do not go together; returns the judge's prices."""
    if bool(options.run) == bool(options.model):
        raise ConfigError(
            f"--run={options.run!r} and --model={options.model!r} were given. Allowed: one of the two. Set --run to a "
            "run's folder, or --model."
        )
    if options.model and not options.judge:
        raise ConfigError(
            f"--model={options.model} is given without --judge. A model without its run has no held-out feedback, so "
            "only judges can evaluate it. Set --judge, or --run."
        )
    if options.model and options.against == "reference":
        raise ConfigError(
            f"--model={options.model} is given with --against=reference, which is the model that a run started from. "
            "Allowed with --model: another model, or a file of outputs. Set --against, or --run."
        )
    if options.model and not options.prompts and not (is_outputs(options.model) and is_outputs(options.against)):
        raise ConfigError(
            f"--model={options.model} is given without --prompts. Both models complete the same prompts, unless both "
            "are files of outputs. Set --prompts."
        )
    if is_bucket(options.run) and not options.out:
        raise ConfigError(f"--run={options.run} is in a bucket, and pages are written to local folders. Set --out.")
    if options.steps and options.model:
        raise ConfigError(f"--steps={options.steps} is given with --model. Only a run has steps. Set --run.")
    require("sklearn", "kto_jax.evaluate", "install kto_jax[judges]")
    return _prices(options.judge_price)


def _prices(text: str) -> tuple[float, float] | None:
    if not text:
        return None
    try:
        one, other = (float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f'--judge_price={text!r} cannot be read. Allowed: two numbers, as in "2.5,10". Correct --judge_price.'
        ) from None
    return one, other


def _instructions(options: Options) -> str:
    if not options.judge_instructions:
        return INSTRUCTIONS
    try:
        return Path(options.judge_instructions).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--judge_instructions={options.judge_instructions} cannot be read: {error}. Allowed: a text file in "
            "UTF-8. Check the path."
        ) from error


def _may_ask(options: Options, task: Task, prices: tuple[float, float] | None, num_steps: int) -> bool:
    """Shows what language models as judges cost; whether they may be asked."""
    urls = [name for name in options.judge if name.startswith(("http://", "https://"))]
    if not urls:
        return True
    prompts: list[Any] = [row.prompt for row in task.rows]
    if not prompts:
        prompts = [one.prompt for one in read_outputs(options.model)[0]]
    endpoint = Endpoint(instructions=_instructions(options), max_tokens=options.judge_max_tokens)
    cost = estimate_cost(endpoint, prompts, task.num_samples, options.max_new_tokens)
    times = len(urls) * num_steps
    price = f", at most ${cost.dollars(prices) * times:.2f}" if prices else ""
    print(
        f"{', '.join(urls)}: {cost.questions * times} questions, two for each pair; at most about "
        f"{cost.tokens_in * times:,} tokens in and {cost.tokens_out * times:,} out{price}. "
        "Cached answers cost nothing.",
        file=sys.stderr,
    )
    if not options.yes:
        print("nothing was asked: add --yes to ask", file=sys.stderr)
    return options.yes


if __name__ == "__main__":
    sys.exit(main())
