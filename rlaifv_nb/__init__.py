"""RLAIF-V in notebooks: sample, divide, verify, pair, train, evaluate. Each module is exported from a notebook."""

__version__ = "0.1.0"
