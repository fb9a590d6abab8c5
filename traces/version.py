"""Which release of this software is running, and which traces it writes."""

from importlib.metadata import PackageNotFoundError, version

# Of the trace format; a reader refuses another version, and passes over what a minor one added.
VERSION, MINOR = 1, 2


def package_version() -> str:
    """Return the installed version, or say that nothing is installed."""
    try:
        return version("kvbudget")
    except PackageNotFoundError:
        return "not installed"
