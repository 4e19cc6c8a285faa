"""`python -m fewbits`: the command line."""

from fewbits.cli import main

if __name__ == "__main__":
    main()
