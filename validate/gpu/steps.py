"""Decode steps of a model with a device's cache, replayed from a CUDA graph where there is one."""

from __future__ import annotations

import inspect

import torch
from transformers import PreTrainedModel

from validate.gpu.cache import DeviceCache


class Steps:
    """One token per row at a time, through memory of fixed places.

    The first step runs as any forward pass, which also compiles what has to be; the second is captured, and
    from then on the host launches one graph a step. What a compression changes stands in the same memory
    afterwards, so that the graph stays valid; dropping rows calls for a new one. On a CPU every step is a
    forward pass.

    Parameters
    ----------
    model : PreTrainedModel
        Within ``evicting(model, cache)``, with the prompts read.
    cache : DeviceCache
    graph : bool
        Whether to capture one, on a GPU.
    """

    def __init__(self, model: PreTrainedModel, cache: DeviceCache, *, graph: bool = True) -> None:
        self._model, self._cache = model, cache
        keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._settings = {"use_cache": True, "past_key_values": cache} | (
            {"logits_to_keep": 1} if keeps else {}
        )
        self._wants_graph = graph and model.device.type == "cuda"
        self._graph: torch.cuda.CUDAGraph | None = None
        self._pool = None
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
        if not self._wants_graph or self._n_plain == 0:
            self._n_plain += 1
            self.logits = self._forward()
            return self.logits
        if self._graph is None:
            self._capture()
        self._cache.require_room()
        self._graph.replay()
        for layer in self._cache.layers:
            layer.count(1)
        self._cache.advance()
        return self.logits

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Drop all other rows, of the cache too."""
        self._cache.batch_select_indices(rows)
        self._ids = self._ids[rows.to(self._ids.device)].contiguous()
        # Other shapes may be compiled anew, which must not happen while a graph is captured.
        self._graph, self._n_plain = None, 0

    def _forward(self) -> torch.Tensor:
        positions = self._cache.n_tokens[:, None].long()
        output = self._model(input_ids=self._ids, position_ids=positions, **self._settings)
        return output.logits[:, -1]

    def _capture(self) -> None:
        cache = self._cache
        graph = torch.cuda.CUDAGraph()
        cache.keeps_time = False
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                self.logits = self._forward()
        finally:
            cache.keeps_time = True
            # Nothing has been computed yet: the replay is the step.
            for layer in cache.layers:
                layer.count(-1)
        self._graph, self._pool = graph, graph.pool()
