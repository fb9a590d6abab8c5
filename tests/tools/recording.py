"""A short recording of a tiny model, and when two are alike."""

import numpy as np

from validate.record.decode import record_decode

PROMPT = [1, 5, 6, 7, 8, 9, 10, 11, 5, 6, 30, 31, 5]


def decode(model, path, n=30, **settings):
    return record_decode(model, None, PROMPT, path, max_new_tokens=n, stop_ids=(), **settings)


def assert_close_traces(first, second, tolerance=1e-4, names=("queries", "keys", "lse")):
    np.testing.assert_array_equal(first.token_ids, second.token_ids)
    for layer in range(first.shape.n_layers):
        for name in names:
            found, expected = getattr(first, name)(layer), getattr(second, name)(layer)
            np.testing.assert_allclose(found, expected, atol=tolerance, rtol=0)
