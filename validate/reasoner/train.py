"""Train the reference reasoner from a seed: one command, resumable, about an hour on two CPU cores.

``python -m validate.reasoner.train --out DIR``

Loss on the chain of thought only. A length curriculum raises the largest problem size when the token
accuracy of the last 50 steps passes 97.5%. The data of a step depend on (seed, step) alone, so a run that is
killed and started again goes on with the same batches.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import deque
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from validate.reasoner.tasks import FAMILIES, make_problem
from validate.reasoner.tokenizer import VOCABULARY_SIZE, build_tokenizer

CURRICULUM = (6, 10, 16, 20)
MOVE_UP_AT = 0.975
TRAINING_SEED = 0


def reasoner_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Give the shape: 6 layers, 8 query and 4 KV heads of width 32, 1.4 million parameters."""
    return LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make_batch(
    tokenizer: PreTrainedTokenizerFast, family: str, step: int, largest: int, tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make one micro-batch of a single problem size: token ids and labels, both (batch, length)."""
    rng = np.random.default_rng([TRAINING_SEED, step, list(FAMILIES).index(family)])
    # Half of the batches at the largest size of the stage: those are the hard ones.
    size = largest if rng.random() < 0.5 else int(rng.integers(3, largest + 1))
    rows, prompts, total = [], [], 0
    while total < tokens:
        problem = make_problem(family, size, TRAINING_SEED, int(rng.integers(2**62)))
        prompt = tokenizer(problem.prompt).input_ids
        chain = tokenizer(problem.completion, add_special_tokens=False).input_ids
        rows.append(prompt + chain + [tokenizer.eos_token_id])
        prompts.append(len(prompt))
        total += len(rows[-1])
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    labels = torch.full((len(rows), length), -100)
    for i, (row, prompt_length) in enumerate(zip(rows, prompts, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, prompt_length : len(row)] = torch.tensor(row[prompt_length:])
    return ids, labels


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm up over 100 steps, hold, then fall linearly to 2% over the second half."""
    if step < 100:
        return peak * (step + 1) / 100
    return peak * min(1.0, max(0.02, 2 * (steps - step) / steps))


def loss_and_accuracy(
    model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """Give the mean cross-entropy on chain tokens and the share predicted exactly."""
    with torch.autocast("cpu" if ids.device.type == "cpu" else "cuda", dtype=torch.bfloat16):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    targets = labels[:, 1:]
    chosen = targets != -100
    logits, targets = logits[chosen].float(), targets[chosen]
    loss = torch.nn.functional.cross_entropy(logits, targets)
    return loss, (logits.argmax(-1) == targets).float().mean().item()


class Run:
    """A training run that can be written to a file and go on from there.

    Attributes
    ----------
    step : int
        Steps done.
    stage : int
        Index into the curriculum.
    seconds : float
        Wall time so far, over all sittings.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, device: str) -> None:
        torch.manual_seed(TRAINING_SEED)
        self.tokenizer, self.device = tokenizer, device
        self.model = LlamaForCausalLM(reasoner_config(tokenizer)).to(device)
        decayed = [p for p in self.model.parameters() if p.ndim == 2]
        others = [p for p in self.model.parameters() if p.ndim != 2]
        groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
        self.step, self.stage, self.seconds = 0, 0, 0.0
        self._recent: deque[float] = deque(maxlen=50)

    def advance(self, rate: float, tokens: int) -> dict[str, float]:
        """Do one step and give its losses and token accuracies."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        figures: dict[str, float] = {}
        for family in FAMILIES:
            share = tokens // len(FAMILIES)
            ids, labels = make_batch(self.tokenizer, family, self.step, CURRICULUM[self.stage], share)
            loss, accuracy = loss_and_accuracy(self.model, ids.to(self.device), labels.to(self.device))
            (loss / len(FAMILIES)).backward()
            figures |= {f"{family}_loss": round(loss.item(), 4), f"{family}_accuracy": round(accuracy, 4)}
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self._recent.append(min(figures[f"{family}_accuracy"] for family in FAMILIES))
        mastered = len(self._recent) == 50 and np.mean(self._recent) > MOVE_UP_AT
        if mastered and self.stage < len(CURRICULUM) - 1:
            self.stage += 1
            self._recent.clear()
        return figures

    def save(self, path: Path) -> None:
        """Write the whole state, atomically."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "stage": self.stage,
            "elapsed": self.seconds,
            "recent": list(self._recent),
        }
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    def restore(self, path: Path) -> None:
        """Go on from a saved state."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.stage, self.seconds = state["step"], state["stage"], state["elapsed"]
        self._recent.extend(state["recent"])


def train(
    out: Path, steps: int, tokens: int, peak: float, device: str = "cpu", checkpoint_every: int = 100
) -> None:
    """Train; write weights, tokenizer and ``training.jsonl`` to ``out``; resume from its checkpoint."""
    out.mkdir(parents=True, exist_ok=True)
    checkpoint, log_path = out / "checkpoint.pt", out / "training.jsonl"
    run = Run(build_tokenizer(), device)
    if checkpoint.exists():
        run.restore(checkpoint)
        print(f"resuming at step {run.step}", flush=True)
    # Rows logged after the checkpoint would come twice: those steps are about to run again.
    logged = log_path.read_text().splitlines(keepends=True) if run.step else []
    log_path.write_text("".join(line for line in logged if json.loads(line)["step"] <= run.step))
    started = time.perf_counter() - run.seconds
    with log_path.open("a") as log:
        while run.step < steps:
            figures = run.advance(learning_rate(run.step, steps, peak), tokens)
            run.seconds = time.perf_counter() - started
            if run.step % 25 == 0 or run.step == steps:
                place = {"step": run.step, "largest_size": CURRICULUM[run.stage]}
                line = json.dumps(place | {"seconds": round(run.seconds, 1)} | figures)
                print(line, file=log, flush=True)
                print(line, flush=True)
            if run.step % checkpoint_every == 0 or run.step == steps:
                run.save(checkpoint)
    run.model.to(torch.bfloat16).save_pretrained(out)
    run.tokenizer.save_pretrained(out)
    print(f"wrote {out}", flush=True)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description="Train the reference reasoner.")
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, log and checkpoint")
    parser.add_argument("--steps", type=int, default=4400)
    parser.add_argument("--tokens", type=int, default=6000, help="tokens per step (default 6000)")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    train(options.out, options.steps, options.tokens, options.learning_rate, options.device)


if __name__ == "__main__":
    main()
