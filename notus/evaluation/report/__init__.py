"""`python -m notus report`: one or more runs as a single HTML file that needs no network."""
