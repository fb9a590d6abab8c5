"""Train the reference reasoner from a seed: one command, resumable, about 45 minutes on two CPU cores.

Loss on the chain of thought only. A length curriculum raises the largest problem size when the token
accuracy of the last 50 steps passes 98%. The data of a step depend on (seed, step) alone, so a run that is
killed and started again goes on with the same batches.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from validate.problems.families import FAMILIES, make_problem
from validate.reasoner.tokenizer import VOCABULARY_SIZE, build_tokenizer

# (sizes, chain lengths) to draw from. Sizes above 18 and chains above 1,000 tokens stay unseen.
CURRICULUM = (((4, 8), (60, 160)), ((4, 12), (100, 320)), ((6, 16), (200, 640)), ((6, 18), (300, 1000)))
MOVE_UP_AT = 0.98
# Share of the checked lines that are wrong at first, so that corrections are learned.
SLIP_RATE = 0.12
TRAINING_SEED = 0
IGNORED = -100
EAGER_UP_TO = 208


def reasoner_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Give the shape: 8 layers, 8 query and 4 KV heads of width 32, 2.3 million parameters."""
    return LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=144,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make_batch(
    tokenizer: PreTrainedTokenizerFast, family: str, step: int, stage: int, tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make one micro-batch of chains of about one length: token ids and labels, both (batch, length)."""
    rng = np.random.default_rng([TRAINING_SEED, step, list(FAMILIES).index(family)])
    sizes, lengths = CURRICULUM[stage]
    length = int(rng.integers(lengths[0], lengths[1] + 1))
    rows, targets, total = [], [], 0
    while total < tokens:
        problem = make_problem(
            family, TRAINING_SEED, int(rng.integers(2**62)), sizes, length, legs=None, slip_rate=SLIP_RATE
        )
        prompt = tokenizer(problem.prompt).input_ids
        chain = tokenizer(problem.completion, add_special_tokens=False).input_ids
        row = torch.tensor([*prompt, *chain, tokenizer.eos_token_id])
        # A slip stands in the context, to be corrected; the model is not taught to make it.
        ignored = [*range(len(prompt)), *(len(prompt) + slip for slip in problem.slips)]
        rows.append(row)
        targets.append(row.index_fill(0, torch.tensor(ignored), IGNORED))
        total += len(row)
    ids = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    return ids, pad_sequence(targets, batch_first=True, padding_value=IGNORED)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm up over 100 steps, hold, then fall linearly to 2% over the second half."""
    if step < 100:
        return peak * (step + 1) / 100
    return peak * min(1.0, max(0.02, 2 * (steps - step) / steps))


def loss_and_accuracy(
    model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """Give the mean cross-entropy on chain tokens and the share predicted exactly."""
    # On CPUs the fused kernel's backward pass is the slower one for short sequences.
    model.config._attn_implementation = "eager" if ids.shape[1] <= EAGER_UP_TO else "sdpa"
    with torch.autocast("cpu" if ids.device.type == "cpu" else "cuda", dtype=torch.bfloat16):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    targets = labels[:, 1:]
    chosen = targets != IGNORED
    logits, targets = logits[chosen].float(), targets[chosen]
    loss = torch.nn.functional.cross_entropy(logits, targets)
    return loss, (logits.argmax(-1) == targets).float().mean().item()


class Run:
    """A training run that can be written to a file and go on from there.

    ``step`` steps are done, ``stage`` is an index into the curriculum, ``seconds`` the time of all sittings.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, device: str) -> None:
        torch.manual_seed(TRAINING_SEED)
        self.tokenizer, self.device = tokenizer, device
        self.model = LlamaForCausalLM(reasoner_config(tokenizer))
        module: torch.nn.Module = self.model  # transformers' own annotation of `to` fits no argument
        module.to(device)
        # From a smaller start, ten digits that are equally likely for long grow into one vector, and no head
        # can copy a digit any more: that happened with tied embeddings.
        torch.nn.init.normal_(self.model.model.embed_tokens.weight, std=0.1)
        # Muon (orthogonalised momentum) for the matrices of the layers, AdamW for embeddings and norms.
        matrices = [p for p in self.model.model.layers.parameters() if p.ndim == 2]
        others = [p for p in self.model.parameters() if not any(p is matrix for matrix in matrices)]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.step, self.stage, self.seconds = 0, 0, 0.0
        self._recent: deque[float] = deque(maxlen=50)

    def advance(self, rate: float, tokens: int) -> dict[str, float]:
        """Do one step and give its losses and token accuracies."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        figures: dict[str, float] = {}
        for family in FAMILIES:
            share = tokens // len(FAMILIES)
            ids, labels = make_batch(self.tokenizer, family, self.step, self.stage, share)
            loss, accuracy = loss_and_accuracy(self.model, ids.to(self.device), labels.to(self.device))
            (loss / len(FAMILIES)).backward()
            figures |= {f"{family}_loss": round(loss.item(), 4), f"{family}_accuracy": round(accuracy, 4)}
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
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
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
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
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
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
                place = {"step": run.step, "stage": run.stage}
                line = json.dumps(place | {"seconds": round(run.seconds, 1)} | figures)
                print(line, file=log, flush=True)
                print(line, flush=True)
            if run.step % checkpoint_every == 0 or run.step == steps:
                run.save(checkpoint)
    run.model.bfloat16().save_pretrained(out)
    run.tokenizer.save_pretrained(out)
    print(f"wrote {out}", flush=True)
