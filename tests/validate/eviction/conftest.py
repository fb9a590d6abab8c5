"""Models of the three shapes, and what transformers writes by them."""

from __future__ import annotations

import pytest
from calling import KINDS, PROMPT, generate, made


@pytest.fixture(scope="module")
def models():
    return {kind: made(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def stock():
    """Give what transformers writes after a prompt by models of the same weights; each text once."""
    models, known = {kind: made(kind) for kind in KINDS}, {}

    def written(kind, ids=PROMPT, **options):
        key = kind, tuple(ids.flatten().tolist()), str(sorted(options.items()))
        if key not in known:
            known[key] = generate(models[kind], ids, **options)
        return known[key]

    return written
