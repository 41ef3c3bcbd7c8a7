"""`python -m tmad.builtin MODEL_FOLDER`: make a model the one in the box."""

import sys
from pathlib import Path

from tmad.builtin import pack

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    pack(Path(sys.argv[1]), Path(__file__).parent)
