"""Sample Factory's own Atari example, with the games registered, which gymnasium does not find by itself."""

import sys

import ale_py  # noqa: F401 - registers the games, in every process that imports this file
from sf_examples.atari.train_atari import main

if __name__ == "__main__":
    sys.exit(main())
