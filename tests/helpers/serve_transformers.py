"""`transformers serve ...` in this process, whatever torch its torchvision was built for.

    python tests/helpers/serve_transformers.py FOLDER --device cpu --port 8000
"""
from __future__ import annotations

import sys

from cpu_torchvision import import_torchvision

if __name__ == "__main__":
    kept = import_torchvision()
    from transformers.cli.transformers import main
    sys.argv[1:1] = ["serve"]
    main()
