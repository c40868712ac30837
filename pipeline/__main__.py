"""`python -m stormline.pipeline` is the command `stormline`."""

from .cli import main

if __name__ == "__main__":
    main()
