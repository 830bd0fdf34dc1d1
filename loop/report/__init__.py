"""The page of a run: one HTML file, self-contained, that is read without a script and without a network."""
