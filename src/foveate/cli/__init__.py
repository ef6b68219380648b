"""The command line, one file for each group of verbs; `foveate.cli.app` has the table of them."""
