"""`python -m dynamo_lightning`."""

from dynamo_lightning.cli import main

if __name__ == "__main__":
    main()
