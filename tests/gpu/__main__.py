"""See `tests.gpu.run`. The native module is built first: the package looks for it once, when it is imported."""

from tests.gpu.build import build

if __name__ == "__main__":
    built = build()
    from tests.gpu.run import main

    main(built)
