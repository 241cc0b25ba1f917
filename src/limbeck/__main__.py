"""``python -m limbeck``, also under ``torchrun -m``."""

from limbeck.cli.app import main

if __name__ == "__main__":
    main()
