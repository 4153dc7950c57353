"""fastbound's version, the one source for package, files and build, and installed versions."""

from importlib import metadata

__version__ = "0.1.0"


def versions(*names: str) -> dict[str, str]:
    """The installed version of each package; packages that are not installed are left out.

    For fastbound it is the version of this code, whether or not it is installed.
    """
    found = {}
    for name in names:
        try:
            found[name] = __version__ if name == "fastbound" else metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
