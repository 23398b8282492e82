"""Trains online: samples completions, scores them with rewards, trains on the feedback that they make, and repeats.

python -m kto_jax.online --config=configs/online_quickstart.py --reward="max_words(12)" --reward="ends_with('.')"

`config.data.train` names a file of prompts; a share `config.data.holdout` of them is never trained on, and measured
before the first and after the last round. Every round is an ordinary run, RUN/round_000/run, on the feedback in
RUN/round_000/feedback.jsonl; its policy is where the next round starts. The same command resumes. docs/online.md
explains the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from kto_jax.command import FINISHED, PREEMPTED, run_command
from kto_jax.progress import announce_import
from kto_jax.training.ending import run_to_end  # before JAX

if __name__ == "__main__":  # The imports below take seconds, and launch scripts restart no run that a signal ends.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(PREEMPTED))
    announce_import()

import numpy as np

from kto_jax.config import ConfigError
from kto_jax.data.tokens.tokenizer import encode_prompts
from kto_jax.data.workers import keep_workers
from kto_jax.devices import processes
from kto_jax.devices.compilation import keep_compiled
from kto_jax.devices.gpu_memory import use_most_gpu_memory
from kto_jax.models.heads import SCALAR_HEAD, TOWER
from kto_jax.models.model import Model, Params
from kto_jax.objectives import Objective
from kto_jax.objectives.record import Advantages
from kto_jax.progress import console, next_lines
from kto_jax.rewards.functions import open_rewards
from kto_jax.rollouts.advantages import advantages, has_spread
from kto_jax.rollouts.figures import explained_variance, figures_of, token_figures, warnings_of
from kto_jax.rollouts.hand_over import check_gap, hand_over
from kto_jax.rollouts.kl_weight import rule_of_round
from kto_jax.rollouts.labels import Labelled, by_prompt, check_rule, label
from kto_jax.rollouts.measure import measure, read_figures, write_figures
from kto_jax.rollouts.options import Options, check_names, check_options, open_folder
from kto_jax.rollouts.policies import Policies, open_policies
from kto_jax.rollouts.prompts import PromptRow, prompts_of_round, read_prompts
from kto_jax.rollouts.rounds import Rollout, Row, check_feedback, sample_round
from kto_jax.rollouts.runs import Runs
from kto_jax.sampling.complete import LanguageModel
from kto_jax.sampling.endpoint import SamplingEndpoint
from kto_jax.sampling.sample import Sampling
from kto_jax.storage.atomic import write_json, write_text
from kto_jax.train import train
from kto_jax.training.preemption import Preemption

_HELD_OUT = 2**31
"""Number of the round whose random keys the held-out completions take."""
_NUM_MEASURED = 64
"""Completions whose tokens are measured, for objectives that only show the figures."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "kto_jax.online", *arguments])

    def run_once(options: Options) -> int:
        with Preemption() as preemption:
            return train_online(options, command, preemption)

    return run_command(run_once, Options, str(__doc__), arguments)


def train_online(options: Options, command: str, preemption: Preemption) -> int:
    """Runs the rounds that are still to be run; returns the exit code.

    Raises:
      ConfigError: a flag, the configuration, the prompts or a reward cannot be used.
      TransientError: running the same command again may help.
    """
    objective = check_options(options)
    processes.join(options.config.processes)
    console.quiet = not processes.is_first()
    prompts, held_out = read_prompts(options.config.data)
    folder = Path(options.workdir)
    keep_compiled()
    use_most_gpu_memory()
    with contextlib.ExitStack() as stack:
        stack.enter_context(keep_workers())
        rewards = processes.on_first(lambda: stack.enter_context(open_rewards(options.reward))) or []
        processes.on_first(lambda: check_names(options, [reward.name for reward in rewards]))
        processes.on_first(lambda: stack.enter_context(open_folder(folder, options)))
        sampling = Sampling(options.temperature, 1.0, 0, options.max_new_tokens)
        runs = Runs(options, objective, folder)
        processes.on_first(lambda: _forget_unsaved(runs))
        policies = open_policies(options.config, options.sample_on, runs.kept)
        endpoint = SamplingEndpoint(options.sample_from, options.sample_model) if options.sample_from else None
        limits = (options.num_samples, options.batch_size)
        rollout = Rollout(sampling, *limits, rewards, options.reward_timeout, endpoint)
        online = _Online(options, objective, policies, runs, prompts, held_out[: options.held_out], rollout, command)
        console.print(
            f"{len(prompts)} prompts to train on, {len(online.held_out)} of {len(held_out)} held-out ones measured"
        )
        for number in range(options.rounds):
            exit_code = online.run_round(number, preemption)
            if exit_code != FINISHED:
                return exit_code
        online.finish()
    return FINISHED


def _forget_unsaved(runs: Runs) -> None:
    rounds = [str(number + 1) for number in runs.forget_unsaved()]
    if rounds:
        console.print(
            f"trained again, from the completions that are there: round {', '.join(rounds)}, of which no checkpoint "
            "was written (--save_every)"
        )


@dataclasses.dataclass(frozen=True)
class _Online:
    """An online run."""

    options: Options
    objective: Objective
    policies: Policies
    runs: Runs
    prompts: Sequence[PromptRow]
    held_out: Sequence[PromptRow]
    rollout: Rollout
    command: str

    def run_round(self, number: int, preemption: Preemption) -> int:
        """Runs one round, or what is left of it; returns the exit code of its training."""
        if number < processes.broadcast_int(len(self.runs.log())):
            return FINISHED
        console.print(f"round {number + 1} of {self.options.rounds}")
        started = time.monotonic()
        figures, dropped = self._prepare(number)
        trained = time.monotonic()
        exit_code = self._train(number, preemption)
        if exit_code == FINISHED:
            ended = time.monotonic()
            figures["training_seconds"], figures["seconds"] = ended - trained, ended - started
            figures["sampling_share"] = figures.get("sampling_seconds", 0.0) / figures["seconds"]
            processes.on_first(lambda: self._record(number, figures, dropped))
        return exit_code

    def _prepare(self, number: int) -> tuple[dict[str, float], dict[str, int]]:
        """Samples, scores and labels a round's completions; returns its figures and what is not trained on."""
        rows, sampling_seconds = self._sample(number)
        by_token = self._measure_tokens(number, rows)
        if self.options.sample_from:
            check_gap(by_token, self.options.max_gap, self.options.sample_from)
        labelled = processes.on_first(lambda: self._write_feedback(number, rows, by_token))
        if labelled is None:
            return {}, {}
        figures = figures_of(rows) | token_figures(by_token, self.options.temperature, self._weight_cap)
        if self.objective.scalar_head == "value":
            figures["explained_variance"] = explained_variance(labelled.rows)
        rule = self._rule()
        if rule is not None and rule.kl_target:
            figures["kl_weight"] = rule.kl_weight
        return figures | {"sampling_seconds": sampling_seconds}, labelled.dropped

    def _write_feedback(self, number: int, rows: Sequence[Row], by_token: dict[str, list[np.ndarray]]) -> Labelled:
        """Writes the round's feedback and says what it is."""
        labelled = self._label(rows, by_token)
        dropped = ", ".join(f"{count} {reason}" for reason, count in labelled.dropped.items())
        both = self.objective.reads == "thumbs" and self.objective.needs_both_labels
        check_feedback(labelled.rows, needs_both=both, number=number, dropped=dropped)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in labelled.rows)
        write_text(self.runs.folder_of(number) / "feedback.jsonl", text)
        kind = {
            "pairs": "pairs",
            "thumbs": f"thumbs, {labelled.desirable} of them desirable",
            "scores": f"completions with advantages, {labelled.desirable} of them positive",
        }[self.runs.format]
        console.print(
            f"reward {figures_of(rows)['reward']:.3f} over {len(rows)} completions; {len(labelled.rows)} {kind}"
            + (f"; not used: {dropped}" if dropped else "")
        )
        return labelled

    def _train(self, number: int, preemption: Preemption) -> int:
        """Trains on the round's feedback, from where the round before ended."""
        runs = self.runs
        return train(runs.config_of(number), runs.run_of(number), self.command, preemption, start=runs.start_of(number))

    def _label(self, rows: Sequence[Row], by_token: dict[str, list[np.ndarray]]) -> Labelled:
        keep_cut, advantage_rule = self.options.trains_cut(self.objective), self._rule()
        if advantage_rule is not None:
            reference = by_token.get("reference_logps", by_token["old_logps"])
            return advantages(
                rows,
                by_token | {"reference_logps": reference},
                advantage_rule,
                keep_cut=keep_cut,
                spread_of=self.options.spread_of,
                weight_cap=self._weight_cap,
            )
        rule = check_rule(self.options.label)
        return label(rows, pairs=self.objective.reads == "pairs", rule=rule, keep_cut=keep_cut)

    @property
    def _weight_cap(self) -> float:
        """Largest importance weight; 0 if the policy samples itself, and tokens have no weights."""
        return self.options.weight_cap if self.options.sample_from else 0.0

    def _rule(self) -> Advantages | None:
        """How the next round's rewards become advantages."""
        rule = self.objective.advantages
        return rule and rule_of_round(rule, self.runs.log())

    def _sample(self, number: int) -> tuple[list[Row], float]:
        """The round's completions with their rewards, and the seconds that they took.

        Before the first round, all prompts are checked, and those that are held out are completed.
        """
        options, seed = self.options, self.options.config.seed
        window = options.prompts_per_round * (1 + options.resample)
        chosen = prompts_of_round(self.prompts, number, window, seed)
        chosen, spare = chosen[: options.prompts_per_round], chosen[options.prompts_per_round :]
        with self._open_policy(number) as model:
            if number and number % options.hand_over_every == 0:
                self._hand_over(number)
            if number == 0:
                processes.on_first(lambda: self._check_lengths(model))
                self._measure(model, 0)
            started = time.monotonic()
            rows: list[Row] = []
            for part in range(1 + options.resample):
                path = self.runs.folder_of(number) / f"rollout{f'_{part}' if part else ''}.jsonl"
                rows += sample_round(model, chosen, self.rollout, number=number, seed=seed, path=path, part=part)
                groups = by_prompt(rows).values()
                missing = options.prompts_per_round - sum(has_spread(group, options.spread_of) for group in groups)
                chosen, spare = spare[:missing], spare[missing:]
                if not chosen:
                    break
            return rows, time.monotonic() - started

    def _hand_over(self, number: int) -> None:
        """Makes the server sample from the policy before a round, unless the round is sampled already."""
        options, sampled = self.options, (self.runs.folder_of(number) / "rollout.jsonl").exists()
        if options.sample_from and not processes.broadcast_bool(sampled):
            processes.on_first(lambda: hand_over(options.hand_over, self.runs.exported_before(number)))

    def _check_lengths(self, model: LanguageModel | None) -> None:
        """Refuses prompts that leave no room for a whole completion: training cuts no sampled token.

        Raises:
          ConfigError: naming the longest prompt.
        """
        assert model is not None, "the first process samples"
        rows = [*self.prompts, *self.held_out]
        lengths = [len(ids) for ids in encode_prompts(model.tokenizer, [row.prompt for row in rows], model.workers)]
        longest, most = int(np.argmax(lengths)), self.options.config.data.max_length
        needed = lengths[longest] + self.options.max_new_tokens
        if needed > most:
            raise ConfigError(
                f"the prompt at {rows[longest].place} has {lengths[longest]} tokens, with "
                f"--max_new_tokens={self.options.max_new_tokens} {needed}, and config.data.max_length={most}. Training "
                f"cuts no sampled token. Set config.data.max_length={needed}, a smaller --max_new_tokens, or shorten "
                "the prompt."
            )

    def _measure_tokens(self, number: int, rows: Sequence[Row]) -> dict[str, list[np.ndarray]]:
        """Log-probabilities of the sampled tokens as training computes them, kept in the round's folder.

        Returns:
          For each completion old_logps, sampled_logps and values; reference_logps if there is another reference. For
          objectives that only show the figures, those of some of the completions.
        """
        path = self.runs.folder_of(number) / "tokens.npz"
        if processes.broadcast_bool(path.exists()):
            return read_figures(path)
        read = rows if self.objective.advantages else rows[:: max(1, len(rows) // _NUM_MEASURED)]
        found: dict[str, list[np.ndarray]] = {}
        policy, head = self._policy_to_measure(number)
        if self.policies.works_here:
            found["sampled_logps"] = [np.asarray(row["logps"], np.float32) for row in read]
            found["old_logps"], found["values"] = self._measured(read, *policy(), head)
            if self.options.reference == "initial":
                initial = self.policies.read(self.runs.initial)
                found["reference_logps"] = self._measured(read, *initial())[0] if number else found["old_logps"]
        if self.options.reference == "previous":
            self.policies.forget_initial()
        processes.on_first(lambda: write_figures(path, found))
        return found

    def _policy_to_measure(self, number: int) -> tuple[Callable[[], tuple[Model, Params]], Params | None]:
        """What takes the policy before a round, and the value head that the round begins with."""
        head = None
        if number and self.objective.scalar_head == "value":
            head = self.policies.value_head(self.runs.run_of(number - 1))
        if self._is_in_memory(number):
            return self.policies.read_last(self.runs.run_of(number - 1)), head
        return self.policies.read(self.runs.policy_before(number)), head

    def _measured(
        self, rows: Sequence[Row], model: Model, params: Params, head: Params | None = None
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Log-probabilities of the rows' tokens under a model, and values by a head."""
        config = self.options.config
        row_length = config.row_length if isinstance(config.row_length, int) else 0
        if head is not None:
            model = dataclasses.replace(model, scalar_head="value", value_tower=TOWER in head)
            params = params | {SCALAR_HEAD: head}
        found = measure(
            model,
            params,
            *([np.asarray(row[name], np.int32) for row in rows] for name in ("prompt_ids", "completion_ids")),
            row_length=row_length or config.data.max_length,
            microbatch_rows=config.microbatch_rows if isinstance(config.microbatch_rows, int) else 8,
            mesh=self.policies.mesh,
        )
        return found.logps, found.values

    def _is_in_memory(self, number: int) -> bool:
        """Whether the policy before a round is taken from memory, or from a checkpoint if the run is resumed."""
        return number > 0 and not self.runs.passes_files

    def _open_policy(self, number: int) -> contextlib.AbstractContextManager[LanguageModel | None]:
        """The policy before a round; None on a process that does not sample."""
        if self._is_in_memory(number):
            return self.policies.open_last(self.runs.run_of(number - 1))
        return self.policies.open(self.runs.policy_before(number))

    def _measure(self, model: LanguageModel | None, rounds: int) -> dict[str, float]:
        """Figures of the held-out prompts, completed by the policy after a number of rounds."""
        if not self.held_out:
            return {}
        path, seed = self._held_out_path(rounds), self.options.config.seed
        return figures_of(sample_round(model, self.held_out, self.rollout, number=_HELD_OUT, seed=seed, path=path))

    def _held_out_path(self, rounds: int) -> Path:
        return self.runs.folder / f"held_out_after_{rounds:03}_rounds.jsonl"

    def _record(self, number: int, figures: dict[str, float], dropped: dict[str, int]) -> None:
        """Records a finished round, and prints what keeps it from teaching anything."""
        figures = self.runs.record(number, figures, dropped)
        for warning in warnings_of(
            figures, max_new_tokens=self.options.max_new_tokens, dtype=self.options.config.model.dtype
        ):
            console.print(f"warning: {warning}", style="yellow")

    def finish(self) -> None:
        """Measures the held-out prompts with the last policy and prints what changed."""
        rounds = self.options.rounds
        if self.held_out:
            self._hand_over(rounds)
            with self._open_policy(rounds) as model:
                before, after = self._measure(model, 0), self._measure(model, rounds)
            processes.on_first(
                lambda: write_json(self.runs.folder / "held_out.json", {"before": before, "after": after})
            )
            for name in ("reward", *(name for name in before if name.startswith("reward/")), "num_tokens", "cut"):
                console.print(f"held-out {name}: {before[name]:.3f} before, {after[name]:.3f} after {rounds} rounds")
            error = math.hypot(before["reward_error"], after["reward_error"])
            console.print(
                f"held-out reward changed by {after['reward'] - before['reward']:+.3f} ± {1.96 * error:.3f} "
                f"(95 %, over {len(self.held_out)} prompts)"
            )
        processes.on_first(self.runs.finish)
        policy, prompts = self.runs.policy_before(rounds), self.options.config.data.train
        against = f"--against={self.runs.initial} --prompts={prompts} --judge=JUDGE"
        for line in next_lines(f"chat --model={policy}", f"evaluate --model={policy} {against}"):
            console.print(line)


if __name__ == "__main__":
    run_to_end(main)
