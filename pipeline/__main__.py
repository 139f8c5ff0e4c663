"""`python -m pipeline` is the command `featureflow`."""

from pipeline.cli import main

if __name__ == "__main__":
    main()
