"""The version, in one place for the package, its files and the build."""

__version__ = "0.1.0"
