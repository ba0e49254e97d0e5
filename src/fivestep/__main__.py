"""`python -m fivestep` is `fivestep`."""

from fivestep.cli import main

main()
