"""Preference accuracy and margins of a model on held-out pairs: `--suite preferences`."""
