"""Measures one ONNX file in a process of its own, run as a script: `session_probe.py MODEL FEED`.

Imports nothing but NumPy and ONNX Runtime, so that what it measures is the session's. FEED is an
.npz file with the inputs; a third argument is the number of threads. Prints one JSON object:
seconds to start the session and of the first run, and resident bytes that both have added.
"""

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime


def resident_bytes() -> int:
    """Resident memory of this process; where the system does not say, its highest so far."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    """Measure, print."""
    model, feed_path, threads = sys.argv[1:4]
    feed = dict(np.load(feed_path))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = int(threads)
    before = resident_bytes()
    start = time.perf_counter()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    started = time.perf_counter()
    session.run(None, feed)
    ran = time.perf_counter()
    print(
        json.dumps(
            {
                "session_start_seconds": started - start,
                "first_run_seconds": ran - started,
                "resident_bytes": resident_bytes() - before,
            }
        )
    )


if __name__ == "__main__":
    main()
