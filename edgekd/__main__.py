"""`python -m edgekd` is the command `edgekd`."""

from edgekd.cli.main import main

main()
