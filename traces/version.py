"""Which release of this software is running."""

from importlib.metadata import PackageNotFoundError, version


def package_version() -> str:
    """Return the installed version, or say that nothing is installed."""
    try:
        return version("kvbudget")
    except PackageNotFoundError:
        return "not installed"
