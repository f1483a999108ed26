"""The stages of a run, one file each: a value in, a record out, nothing reaches back."""
