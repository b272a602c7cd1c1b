"""Set before anything imports torch or the Hub's client."""

import os


os.environ.setdefault("OMP_NUM_THREADS", "1")  # the suite runs one process per core
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may need the network
os.environ["TOKENIZERS_PARALLELISM"] = "false"
