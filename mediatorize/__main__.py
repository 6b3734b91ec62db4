"""`python -m mediatorize`: the command, where it is not on the path, and for `torchrun -m mediatorize`."""

from mediatorize.cli import main

main()
