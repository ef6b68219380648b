"""`python -m foveate`: the command line."""

from foveate.cli.app import main

main()
