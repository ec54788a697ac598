"""`python -m mpocompress`: the command line."""

from mpocompress.cli import main

main()
