"""`python -m tgate_fx` does what `tgate-fx` does."""

from .commands import main

if __name__ == "__main__":
    main()
