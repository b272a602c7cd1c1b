"""`bt-adapter finetune` in a process of its own that fetches a few rows at a time, to be watched and killed."""

import sys

from bt_adapter_hf.cli.main import main
from bt_adapter_hf.data import readers


if __name__ == "__main__":
    readers.ROWS_PER_SHARD = int(sys.argv[1])
    sys.exit(main(["finetune", *sys.argv[2:]]))
