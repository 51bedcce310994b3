"""The memory policy, in processes of their own: it lasts as long as a process does."""

import subprocess
import sys

import pytest

_BLOCK_BYTES = 100 << 20
_LAYERS = """
import resource, sys, threading
from lookalike.native_libraries import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
import numpy as np

def layers():
    np.ones({size}, np.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        np.ones({size}, np.uint8)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=layers)
thread.start()
thread.join()
"""


def page_faults(policy: str) -> int:
    """Of five blocks that are used one after the other, in another thread than the first."""
    program = _LAYERS.format(size=_BLOCK_BYTES)
    done = subprocess.run([sys.executable, "-c", program, policy], check=True, capture_output=True, text=True)
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the C library must be glibc")
def test_freed_memory_is_used_again_without_asking_the_system_for_it() -> None:
    assert page_faults("kept") < 20
    assert page_faults("as it comes") > 200  # pages of 2 MB, where numpy gets those
