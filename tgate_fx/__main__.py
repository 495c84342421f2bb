"""`python -m tgate_fx` does what `tgate-fx` does."""

from .commands import main

main()
