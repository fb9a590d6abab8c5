"""Packages that only some verbs need, and the one sentence that is said where such a package is missing."""

from __future__ import annotations

from importlib.util import find_spec

from traces.errors import UserError

# Name of an import to the extra of this package that installs it.
EXTRAS = {
    "torch": "validate",
    "transformers": "validate",
    "gguf": "validate",
    "accelerate": "validate",
    "altair": "plots",
    "vl_convert": "plots",
    "jinja2": "plots",
    "math_verify": "math",
    "optuna": "search",
    "fsspec": "remote",
    "dask": "cluster",
    "distributed": "cluster",
    "ray": "cluster",
}
# From its index pip picks a build of torch with gigabytes of CUDA, wherever it runs.
_BEFORE = {"torch": "; without a GPU, PyTorch's CPU build first"}
_DISTRIBUTIONS = {"vl_convert": "vl-convert-python", "math_verify": "math-verify"}


def require_extra(what: str, *packages: str) -> None:
    """Refuse to begin what needs packages that are not installed.

    Parameters
    ----------
    what : str
        What needs them, the subject of the sentence.
    *packages : str
        Names of imports, among ``EXTRAS``.

    Raises
    ------
    UserError
        For the first that is missing, with the command that installs it.
    """
    for package in packages:
        if not _is_installed(package):
            raise lacking(what, package)


def lacking(what: str, package: str) -> UserError:
    """Say that ``what`` needs a package, and how to get it."""
    name = _DISTRIBUTIONS.get(package, package)
    return UserError(
        f"{what} needs {name}, which is not installed; allowed: pip install "
        f"'kvbudget[{EXTRAS[package]}]'{_BEFORE.get(package, '')}"
    )


def explained(error: ImportError) -> UserError | None:
    """Say what an import that failed in the middle of a verb lacked; None if it was not one of the extras."""
    package = (error.name or "").partition(".")[0]
    if package not in EXTRAS:
        return None
    if isinstance(error, ModuleNotFoundError) and error.name == package:
        return lacking("this command", package)
    return UserError(
        f"{package} is installed, but cannot be used: {error}; allowed: pip install "
        f"'kvbudget[{EXTRAS[package]}]', which brings a version that can"
    )


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False
