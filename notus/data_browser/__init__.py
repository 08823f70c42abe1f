"""`python -m notus data`: the rows of a config as the model sees them, in a terminal, as JSON, or as a page."""
