"""`python -m tsotsallm` is `tsotsallm`."""

from tsotsallm.cli import main

main()
