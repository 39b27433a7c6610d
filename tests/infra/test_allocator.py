"""Freed memory stays with the process: the same tensors, made again, fault no page."""

import ctypes
import os
import subprocess
import sys

import pytest

_COUNT = """
import resource, torch
from infra.allocator import keep_freed_memory
if {keep}:
    assert keep_freed_memory()
def step():
    [torch.ones(n << 18) for n in range(1, 20)]  # 1 to 19 MB, all at once
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
before = faults()
for _ in range(5):
    step()
print(faults() - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="needs glibc")
def test_a_step_faults_no_memory_in_again():
    returns = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}  # glibc's defaults, held fast
    faults = {
        keep: int(subprocess.check_output([sys.executable, "-c", _COUNT.format(keep=keep)], env=os.environ | returns))
        for keep in (False, True)
    }
    assert faults[False] > 10_000
    assert faults[True] < 100
