"""Writing answers about video: continuously, against transformers' `generate`, one by one and in static batches.

    python benchmarks/llm.py [--rounds 3]

The model that stormline ships, prompts of 256 video tokens, answers of 8 to 48 tokens (what people ask for differs,
which is what a static batch suffers from). In one process and in turns, greedy, with the same prompts and lengths: the
video is another for each prompt, then the same for all.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from measuring import in_turns, spent_on, write_result

from stormline.models.generation import check_prompt, generate_answers
from stormline.models.loading import LoadedModel, load_model
from stormline.models.prompts import VideoPrompt
from stormline.models.selection import VideoChunk

REQUESTS = (1, 4, 16)
STATIC_BATCH = 8
N_CHUNKS, CHUNK_TOKENS = 16, 16
WORDS = (8, 48, 16, 32)
N_SPECIAL = 7  # tokens with a meaning of their own, which come first


def make_prompts(loaded: LoadedModel, n: int, *, same_video: bool) -> list[VideoPrompt]:
    """Return prompts about random tokens."""
    prompts = []
    for i in range(n):
        rng = np.random.default_rng(0 if same_video else i)
        tokens = rng.standard_normal((N_CHUNKS, CHUNK_TOKENS, loaded.model.config.d_model)).astype(np.float16)
        chunks = tuple(VideoChunk(2.0 * k, 2.0 * k + 2, tokens[k]) for k in range(N_CHUNKS))
        prompts.append(VideoPrompt("Describe what happens.", chunks, max_new_tokens=WORDS[i % len(WORDS)]))
    return prompts


def never_end(_: torch.nn.Module, __: Any, logits: torch.Tensor) -> torch.Tensor:
    """Leave an answer no way to end before its limit: all ways shall write the same number of tokens."""
    logits[..., :N_SPECIAL] = -torch.inf
    return logits


def by_generate(loaded: LoadedModel, prompts: Sequence[VideoPrompt], batch: int) -> None:
    """Answer with transformers' own generation, so many prompts in a batch, each batch until its longest is done."""
    model: Any = loaded.model
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        built = [check_prompt(model, loaded.processor, prompt) for prompt in part]
        ids = torch.stack([b.input_ids for b in built])  # all as long: no padding to pay for
        video = torch.cat([b.video_tokens for b in built]).float()
        n = max(prompt.max_new_tokens for prompt in part)
        model.generate(ids, video_tokens=video, min_new_tokens=n, max_new_tokens=n, do_sample=False, pad_token_id=0)


def measure(loaded: LoadedModel, n: int, rounds: int, *, same_video: bool) -> dict[str, Any]:
    """Return tokens a second of each way, and the ratios."""
    prompts = make_prompts(loaded, n, same_video=same_video)
    written = [answer.generated_tokens for answer in generate_answers(loaded.model, loaded.processor, prompts)]
    asked = [prompt.max_new_tokens for prompt in prompts]
    if written != asked:
        raise RuntimeError(f"answers of {written} tokens; expected {asked}, as the others write")
    with torch.inference_mode():
        took = in_turns(
            {
                "ours": lambda: generate_answers(loaded.model, loaded.processor, prompts),
                "one by one": lambda: by_generate(loaded, prompts, 1),
                "static batches": lambda: by_generate(loaded, prompts, STATIC_BATCH),
            },
            rounds,
        )
        spent = spent_on(lambda: generate_answers(loaded.model, loaded.processor, prompts), times=1)
    rates = {name: sum(asked) / s for name, s in took.items()}
    return {
        "tokens_per_s": round(rates["ours"], 1),
        "over one by one": round(rates["ours"] / rates["one by one"], 2),
        "over static batches": round(rates["ours"] / rates["static batches"], 2),
        "spent_on": spent,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="as the deployment has by default")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    loaded = load_model(None, device="cpu")
    loaded.model.get_output_embeddings().register_forward_hook(never_end)
    report: dict[str, Any] = {"threads": options.threads, "static_batch": STATIC_BATCH}
    for name, same in (("each its own video", False), ("the same video", True)):
        report[name] = {}
        for n in REQUESTS:
            report[name][str(n)] = told = measure(loaded, n, options.rounds, same_video=same)
            print(f"{name}, {n} requests: {told}", flush=True)
    write_result("llm", report, ["torch", "transformers"])


if __name__ == "__main__":
    main()
