"""How far each op is from the memory floor and from every rival, measured: `python -m bench`, or `fastbn bench`."""

import os

# Below this level torch's profiler tells stderr whenever it starts and stops.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
