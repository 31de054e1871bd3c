"""`python -m fastloss` is the command `fastloss`."""

from .cli import main

if __name__ == "__main__":
    main()
