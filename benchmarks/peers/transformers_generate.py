"""transformers' generate, one batch after the other. Runs in its own environment, which has torch but not kto_jax."""

from __future__ import annotations

import time

import torch
import transformers

from benchmarks.peers.turn import read_job, report


def main() -> None:
    """Runs the job."""
    job = read_job()
    torch.set_num_threads(job["threads"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, job["dtype"])
    model = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype).to(device).eval()
    eos_ids = job["eos_ids"] if job["stops"] else None
    model.generation_config.eos_token_id = eos_ids
    prompts = sorted(job["prompts"][: job["num_prompts"]], key=len)

    def complete(max_new_tokens: int) -> int:
        tokens = 0
        for start in range(0, len(prompts), job["slots"]):
            batch = prompts[start : start + job["slots"]]
            longest = max(map(len, batch))
            ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in batch], device=device)
            mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch], device=device)
            written = model.generate(
                ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                pad_token_id=job["eos_ids"][0], max_new_tokens=max_new_tokens,
            )[:, longest:]  # fmt: skip
            ends = torch.isin(written, torch.tensor(eos_ids or [], device=device))
            # Up to the first EOS, and with it.
            tokens += int((ends.cumsum(1) - ends.long() == 0).sum())
        return tokens

    torch.manual_seed(1)
    complete(8)
    start, cpu_start = time.perf_counter(), time.process_time()
    tokens = complete(job["max_new_tokens"])
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    report(job, tokens=tokens, seconds=seconds, cpu_seconds=cpu_seconds, versions=versions)


if __name__ == "__main__":
    main()
