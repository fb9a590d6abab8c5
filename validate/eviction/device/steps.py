"""Decode steps of a model with an evicting cache, replayed from a CUDA graph where there is one."""

from __future__ import annotations

from typing import cast

import torch
from transformers import PreTrainedModel

from validate.eviction.device.back_end import DeviceBackEnd
from validate.eviction.face import PolicyCache
from validate.models.load import LENGTH_DEPENDENT_ROPE, rope_parameters
from validate.models.next_token import forward_settings


class Steps:
    """One token per row at a time.

    With a device's cache on a GPU the first step runs as any forward pass, which also compiles what has to
    be; the second is captured, and from then on the host launches one graph a step. What a compression
    changes stands in the same memory afterwards, so that the graph stays valid; dropping rows calls for a new
    one. Elsewhere, and where the model's steps cannot be captured, every step is a forward pass.

    Parameters
    ----------
    model : PreTrainedModel
        Within ``evicting(model, cache)``, with the prompts read.
    cache : PolicyCache
    graph : bool
        Whether to capture one, on a GPU.

    Attributes
    ----------
    not_captured : str or None
        Why there is no graph though one was wanted.
    """

    def __init__(self, model: PreTrainedModel, cache: PolicyCache, *, graph: bool = True) -> None:
        self._model, self._cache = model, cache
        # Only a device's is asked for what a graph needs.
        self._back_end = cast(DeviceBackEnd, cache.back_end)
        self._settings = forward_settings(model) | {"past_key_values": cache}
        self._wants_graph = graph and model.device.type == "cuda" and cache.back_end.on_device
        self.not_captured: str | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._n_plain = 0
        self._ids = torch.zeros(len(cache.n_tokens), 1, dtype=torch.long, device=model.device)
        self.logits = torch.empty(0)

    @property
    def is_captured(self) -> bool:
        """Whether the latest step was a graph's replay."""
        return self._graph is not None

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Feed one token per row.

        Parameters
        ----------
        tokens : int Tensor, shape (n_rows,)
            On any device.

        Returns
        -------
        Tensor, shape (n_rows, n_token_ids)
            Logits, in the model's dtype; overwritten by the next step.
        """
        self._ids.copy_(tokens[:, None])
        if self._wants_graph and self._n_plain and self._graph is None:
            self._capture()
        if self._graph is None:
            self._n_plain += 1
            self.logits = self._forward()
            return self.logits
        self._back_end.require_room()
        self._graph.replay()
        for layer in self._cache.own_layers:
            layer.count(1)
        self._back_end.advance()
        return self.logits

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Drop all other rows, of the cache too."""
        self._cache.batch_select_indices(rows)
        self._ids = self._ids[rows.to(self._ids.device)].contiguous()
        # Other shapes may be compiled anew, which must not happen while a graph is captured.
        self._graph, self._n_plain = None, 0

    def _forward(self) -> torch.Tensor:
        positions = self._cache.n_tokens[:, None].long().to(self._ids.device)
        output = self._model(input_ids=self._ids, position_ids=positions, **self._settings)
        return output.logits[:, -1]

    def _capture(self) -> None:
        cache, rope = self._cache, rope_parameters(self._model.config).get("rope_type", "default")
        if rope in LENGTH_DEPENDENT_ROPE:  # the host has to know the longest position
            self._give_up(f"RoPE of type '{rope}' asks the device for positions")
            return
        # A token without room is refused before anything is captured.
        self._back_end.require_room()
        n_seen = cache.get_seq_length()
        graph = torch.cuda.CUDAGraph()
        self._back_end.keeps_time = False
        try:
            # Each has a pool of its own: that of a graph that is gone may not be given to another. And where
            # a capture fails at its end, its stream would stay the current one.
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
                logits = self._forward()
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self._give_up(" ".join(str(error).split())[:200])
            return
        finally:
            self._back_end.keeps_time = True
            # Nothing has been computed yet: the replay is the step.
            cache.calls.begin_again()
            for layer in cache.own_layers:
                layer.count(n_seen - layer.get_seq_length())
        self._graph, self.logits = graph, logits

    def _give_up(self, why: str) -> None:
        self._wants_graph, self.not_captured = False, why


def is_out_of_memory(error: BaseException | None) -> bool:
    """Say whether an error, or one that it followed, is that a device's memory is full."""
    while error is not None:
        # What is not the allocator's own says so in words only, as graphs and libraries do.
        words = str(error).lower()
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in words or "alloc_failed" in words:
            return True
        error = error.__cause__ or error.__context__
    return False
