"""`python -m memedge` is `memedge`."""

from memedge.cli import main

main()
