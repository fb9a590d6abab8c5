"""Models whose every weight was found; the library draws what it does not find, and says so in passing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from traces.errors import UserError


def load_whole(source: str | Path, what: str, **options: Any) -> PreTrainedModel:
    """Load a causal language model.

    Parameters
    ----------
    source : str or Path
    what : str
        What messages call the model.
    **options
        Of ``from_pretrained``.

    Raises
    ------
    UserError
        When weights are missing or of another shape.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **options)
    model, told = loaded
    missing = sorted({*told["missing_keys"], *(name for name, *_ in told["mismatched_keys"])})
    if missing:
        raise UserError(
            f"{what}: {len(missing)} weights are missing or of another shape, such as {missing[0]}; allowed: "
            "a whole model"
        )
    return model
