"""Build training sets by measuring what each example teaches the model."""

__version__ = "0.1.0"
