"""The command line: thin commands over the public functions, imported late so that help and doctor start fast."""
