"""What a result depends on beside its inputs: the library's build, the machine, the number of threads."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import torch

import pycert
from pycert import _C


def library() -> dict[str, str]:
    """Versions, and the SHA-256 of the compiled module that does the arithmetic."""
    build = Path(_C.__file__)
    return {
        "pycert": pycert.__version__,
        "build": hashlib.sha256(build.read_bytes()).hexdigest(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def machine() -> dict[str, Any]:
    """Processor, cores, threads and operating system."""
    processor = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        processor = names[0] if names else processor
    except OSError:
        pass  # not Linux: the general name stands
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
