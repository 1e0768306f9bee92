"""The benchmark: each op against the memory floor and every rival. `python -m bench`, or `fastbn bench`."""

import os

# Below this level torch's profiler writes to stderr whenever it starts and stops.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
