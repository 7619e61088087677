"""``python -m nanhunt``: the same program as ``nanhunt``, for launchers such as torchrun that start a module."""

from nanhunt.cli.app import main

if __name__ == "__main__":
    main()
