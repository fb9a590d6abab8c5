"""Memory of all layers on a device: one block, laid out once for the largest it has to hold."""

from __future__ import annotations

import numpy as np
import torch

from traces.errors import NoDeviceError


class DevicePool:
    """Keys, values and positions of every segment, in stretches of fixed size.

    A stretch belongs to one layer and sequence, and its KV heads share it: what one gives up another can use.

    Parameters
    ----------
    stretches : int64 (n_layers, n_rows)
        Slots of each stretch.
    n_kv_heads, head_dim : int
    dtype : torch.dtype
    device : torch.device

    Attributes
    ----------
    keys, values : Tensor, shape (capacity, head_dim)
    positions : int32 Tensor, shape (capacity,)
    bases : int64 (n_layers, n_rows)
        First slot of each stretch; known to the host.
    bytes_taken : int
        What the device's allocator gave for keys and values.
    starts : int64 Tensor, shape (n_layers, n_rows, n_kv_heads)
    lengths : int32 Tensor, shape (n_layers, n_rows, n_kv_heads)

    Raises
    ------
    NoDeviceError
        When the device has less memory than that.
    """

    def __init__(
        self, stretches: np.ndarray, n_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        capacity = int(stretches.sum())
        self.stretches = stretches
        self.bases = (np.cumsum(stretches) - stretches.reshape(-1)).reshape(stretches.shape)
        per_slot = 2 * head_dim * dtype.itemsize + 4
        before = _taken(device)
        try:
            self.keys = torch.empty(capacity, head_dim, dtype=dtype, device=device)
            self.values = torch.empty_like(self.keys)
            self.bytes_taken = _taken(device) - before if device.type == "cuda" else self.bytes_allocated
            self.positions = torch.empty(capacity, dtype=torch.int32, device=device)
        except torch.OutOfMemoryError as error:
            raise NoDeviceError(
                f"a KV cache of {capacity * per_slot / 1e9:.1f} GB does not fit into the memory of device "
                f"'{device}'; allowed: a smaller batch, budget or model"
            ) from error
        heads = (*stretches.shape, n_kv_heads)
        self.starts = torch.zeros(heads, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(heads, dtype=torch.int32, device=device)

    @property
    def entries(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys, values and positions."""
        return self.keys, self.values, self.positions

    @property
    def bytes_allocated(self) -> int:
        """Bytes of the block: keys and values."""
        return self.keys.nbytes + self.values.nbytes

    def layers(self, first: int, stop: int) -> slice:
        """Give the slots of some neighbouring layers."""
        return slice(
            int(self.bases[first].min()),
            int((self.bases[stop - 1] + self.stretches[stop - 1]).max()),
        )

    def keep_rows(self, rows: np.ndarray, index: torch.Tensor) -> None:
        """Forget all other rows; their slots lie idle."""
        self.stretches, self.bases = self.stretches[:, rows], self.bases[:, rows]
        self.starts, self.lengths = self.starts[:, index].contiguous(), self.lengths[:, index].contiguous()


def _taken(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
