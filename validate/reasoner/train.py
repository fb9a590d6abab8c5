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


def train(out: Path, steps: int, tokens: int, peak: float, device: str) -> None:
    """Train and write weights, tokenizer and ``training.jsonl`` to ``out``; resume from ``out/checkpoint.pt``."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    torch.manual_seed(TRAINING_SEED)
    model = LlamaForCausalLM(reasoner_config(tokenizer)).to(device)
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98))
    first, stage, elapsed = 0, 0, 0.0
    recent: deque[float] = deque(maxlen=50)
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, stage, elapsed = state["step"], state["stage"], state["elapsed"]
        recent.extend(state["recent"])
        print(f"resuming at step {first}", flush=True)

    started = time.perf_counter() - elapsed
    with (out / "training.jsonl").open("a") as log:
        for step in range(first, steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, peak)
            losses, accuracies = [], []
            for family in FAMILIES:
                ids, labels = make_batch(tokenizer, family, step, CURRICULUM[stage], tokens // len(FAMILIES))
                loss, accuracy = loss_and_accuracy(model, ids.to(device), labels.to(device))
                (loss / len(FAMILIES)).backward()
                losses.append(loss.item())
                accuracies.append(accuracy)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            recent.append(min(accuracies))
            if len(recent) == 50 and np.mean(recent) > MOVE_UP_AT and stage < len(CURRICULUM) - 1:
                stage += 1
                recent.clear()
            if step % 25 == 0 or step == steps - 1:
                row = {
                    "step": step,
                    "largest_size": CURRICULUM[stage],
                    "seconds": round(time.perf_counter() - started, 1),
                    **{f"{name}_loss": round(value, 4) for name, value in zip(FAMILIES, losses, strict=True)},
                    **{
                        f"{name}_accuracy": round(value, 4)
                        for name, value in zip(FAMILIES, accuracies, strict=True)
                    },
                }
                log.write(json.dumps(row) + "\n")
                log.flush()
                print(json.dumps(row), flush=True)
            if step % 100 == 99 or step == steps - 1:
                state = {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step + 1,
                    "stage": stage,
                    "elapsed": time.perf_counter() - started,
                    "recent": list(recent),
                }
                torch.save(state, checkpoint.with_suffix(".tmp"))
                os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"wrote {out}", flush=True)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description="Train the reference reasoner.")
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, log and checkpoint")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--tokens", type=int, default=6000, help="tokens per step (default 6000)")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    train(options.out, options.steps, options.tokens, options.learning_rate, options.device)


if __name__ == "__main__":
    main()
