"""The version, in one place for the package, its files and the build; and those of others."""

from importlib import metadata

__version__ = "0.1.0"


def versions(*names: str) -> dict[str, str]:
    """The installed versions by package; what is not installed is left out.

    fastbound's own is that of this code, installed or not.
    """
    found = {}
    for name in names:
        try:
            found[name] = __version__ if name == "fastbound" else metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
