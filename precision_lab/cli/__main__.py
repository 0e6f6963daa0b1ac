"""`python -m precision_lab.cli` is `precision-lab`."""

from precision_lab.cli.app import main

if __name__ == "__main__":
    main()
