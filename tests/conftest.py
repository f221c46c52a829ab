"""Settings every test runs under: offline, and one thread per numeric library.

They are environment variables read when torch, tokenizers and the rest are imported, so they are set here, before any
test module is. Servers that tests start as processes inherit them.
"""

import os
import signal
from pathlib import Path

# No test may reach for a hub, not even by accident: a missing file must fail at once instead of retrying downloads.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tiny tensors gain nothing from threads, and a reduction split over another number of threads rounds differently.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# gRPC writes to stderr about every fork and closed socket otherwise.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
# Triton decides at import whether kernels are compiled or interpreted. Without a GPU there is only the latter.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# A shell that runs the tests in the background lets them ignore SIGINT, and some of them interrupt what they test.
signal.signal(signal.SIGINT, signal.default_int_handler)
