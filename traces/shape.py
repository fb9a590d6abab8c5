"""The sizes of a model's attention: layers, heads, head dimension and storage type."""

from __future__ import annotations

from dataclasses import dataclass

DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """How many layers and heads a model has, and in which type its entries are stored.

    Query head ``h`` reads KV head ``h // group_size``.

    Parameters
    ----------
    n_layers, n_query_heads, n_kv_heads, head_dim : int
        At least 1 each; ``n_query_heads`` is a multiple of ``n_kv_heads``.
    dtype : str
        ``float16``, ``bfloat16`` or ``float32``.

    Raises
    ------
    ValueError
        If a size is not a positive integer, the heads do not divide, or the dtype is unknown.
    """

    n_layers: int
    n_query_heads: int
    n_kv_heads: int
    head_dim: int
    dtype: str = "float16"

    def __post_init__(self) -> None:
        for name in ("n_layers", "n_query_heads", "n_kv_heads", "head_dim"):
            size = getattr(self, name)
            if type(size) is not int or size < 1:
                raise ValueError(f"{name} is {size!r}; allowed: an integer of at least 1")
        if self.n_query_heads % self.n_kv_heads:
            raise ValueError(
                f"n_query_heads is {self.n_query_heads}; allowed: a multiple of "
                f"n_kv_heads ({self.n_kv_heads})"
            )
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype is {self.dtype!r}; allowed: {', '.join(DTYPE_BYTES)}")

    @property
    def group_size(self) -> int:
        """Return the number of query heads that share one KV head."""
        return self.n_query_heads // self.n_kv_heads

    @property
    def itemsize(self) -> int:
        """Return the bytes of one stored number."""
        return DTYPE_BYTES[self.dtype]

    @property
    def bytes_per_entry(self) -> int:
        """Return the bytes of one entry: key and value of one KV head of one layer."""
        return 2 * self.head_dim * self.itemsize
