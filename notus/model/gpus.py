"""GPUs by name: memory, arithmetic and links, from their data sheets."""

import dataclasses
import difflib
import itertools
import re

# Of what a data sheet promises of a link, the share that a large collective is taken to reach: an assumption.
LINK_EFFICIENCY = 0.75
PER_NODE = 8


@dataclasses.dataclass(frozen=True)
class GPU:
    """What is to be known of a GPU.

    Attributes:
        memory: MiB that the driver reports.
        teraflops: dense bf16 matrix products, 10^12 operations per second.
        teraflops_fp32: the same in fp32, not by way of tf32, which torch does not use by default.
        link: GB/s between the GPUs of a node, one direction (NVLink, else PCIe).
        network: GB/s per GPU between nodes; clouds differ: an assumption.
    """

    memory: int
    teraflops: float
    teraflops_fp32: float
    link: float
    network: float

    @property
    def capacity(self) -> int:
        """Bytes."""
        return self.memory * 2**20

    def rate(self, precision: str) -> float:
        """10^12 operations per second in "bf16" or "fp32"."""
        return self.teraflops if precision == "bf16" else self.teraflops_fp32


GPUS = {
    "a100-40gb": GPU(40536, 312, 19.5, 300, 25),
    "a100-80gb": GPU(81920, 312, 19.5, 300, 25),
    "a800": GPU(81920, 312, 19.5, 200, 25),
    "h100": GPU(81559, 989, 67, 450, 50),
    "h100-pcie": GPU(81559, 756, 51, 32, 25),
    "h100-nvl": GPU(95830, 835, 60, 300, 25),
    "h200": GPU(143771, 989, 67, 450, 50),
    "h200-nvl": GPU(143771, 835, 60, 450, 25),
    "gh200": GPU(97871, 989, 67, 450, 50),
    "h20": GPU(97871, 148, 44, 450, 50),
    "b200": GPU(183359, 2250, 80, 900, 50),
    "l40s": GPU(46068, 362, 91.6, 32, 12.5),
    "l40": GPU(46068, 181, 90.5, 32, 12.5),
    "a10g": GPU(23028, 70, 31.5, 32, 12.5),
    "a10": GPU(23028, 125, 31.2, 32, 12.5),
    "a30": GPU(24576, 165, 10.3, 32, 12.5),
    "a40": GPU(46068, 150, 37.4, 32, 12.5),
    "l4": GPU(23034, 121, 30.3, 32, 12.5),
    "a6000": GPU(49140, 155, 38.7, 32, 12.5),
    "rtx6000-ada": GPU(49140, 364, 91.1, 32, 12.5),
    "rtx3090": GPU(24576, 71, 35.6, 32, 12.5),
    "rtx4090": GPU(24564, 165, 82.6, 32, 12.5),
    "rtx5090": GPU(32607, 209, 104.8, 64, 12.5),
}

# Words of a driver's name that make a known GPU another one: "RTX 3090 Ti", "RTX 4090 D", a slice of an A100.
_OTHERS = frozenset({"laptop", "max", "mig", "ti", "super", "d"})


def find_gpu(name: str) -> GPU:
    """Raises ValueError, naming the nearest one, for a GPU that is not known."""
    key = name.lower().replace(" ", "").replace("_", "-")
    if key not in GPUS:
        near = [known for known in GPUS if known.startswith(key)] or difflib.get_close_matches(key, GPUS, n=1)
        hint = f"did you mean {' or '.join(near)}?" if near else f"take one of {', '.join(GPUS)}"
        raise ValueError(f"--gpu {name}: not a GPU that the estimate knows; {hint}")
    return GPUS[key]


def gpu_of_driver(name: str) -> GPU | None:
    """The GPU that a driver calls `name`, such as "NVIDIA A100-SXM4-40GB"; None if it is not known.

    All words of a key are words of the name; a size and "GB", or "RTX" and a number, may stand apart.
    """
    words = re.findall(r"[a-z0-9]+", name.lower())
    if _OTHERS.intersection(words):
        return None
    known = {*words, *(first + second for first, second in itertools.pairwise(words) if first == "rtx")}
    known |= {number + "gb" for number, unit in itertools.pairwise(words) if unit == "gb"}
    fitting = [key for key in GPUS if known.issuperset(key.split("-"))]
    return GPUS[max(fitting, key=len)] if fitting else None
