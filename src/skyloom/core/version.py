"""The version number of skyloom: the single source for the package, its build and its receipts."""

__version__ = "0.1.0"
