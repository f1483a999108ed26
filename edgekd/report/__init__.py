"""The report of a run: one HTML file that a reader without edgekd can open, with every number's conditions."""
