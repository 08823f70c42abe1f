"""Direct Preference Optimization in pure PyTorch."""

__version__ = "0.2.0"
