"""Soft caps, sinks and values of another size: forward and backward of one packed row's attention, beside plain varlen.

    python benchmarks/attention_variants.py            # on a GPU, about 3 minutes
    python benchmarks/attention_variants.py --cpu      # a toy row, to see that it runs

Each line is one attention, of the sizes of a real model, by the kernel that training takes and by the plain kernel, one
pass per segment. Ratios are to varlen attention of the same queries and keys, without soft cap or sinks and with values
of the same size. The median of `--repeats` passes; the first, which compiles, is not counted.
"""

import argparse
import dataclasses
import time
from statistics import median

import torch

from common import synchronize
from notus.data.packing import Layout, build_layout
from notus.model.attention import Kernel, Sizes, check_kernel, kernel_for, packed_attention
from notus.model.attention_variants import plain_kernel

# What models have: heads, key/value heads, size of heads, of values, window, soft cap, sinks.
MODELS = {
    "Gemma 2 9B": Sizes(16, 8, 256, 256, None, 50.0),
    "Gemma 2 9B, window": Sizes(16, 8, 256, 256, 1024, 50.0),
    "gpt-oss 20B": Sizes(64, 8, 64, 64, None, None, sinks=True),
    "gpt-oss 20B, window": Sizes(64, 8, 64, 64, 128, None, sinks=True),
    "DeepSeek-V2-Lite": Sizes(16, 16, 192, 128),
}
TOY = Sizes(4, 2, 16, 8, 20, 5.0, sinks=True)
# Pairs of a row: trunks, and both branches.
ROW = ([900, 400, 150, 60], [[500, 420], [700, 300], [250, 350], [40, 26]])
TOY_ROW = ([40, 9], [[30, 20], [7, 12]])


def seconds(sizes: Sizes, layout: Layout, device: torch.device, kernel: Kernel | None, repeats: int) -> float:
    """Median seconds of one forward and backward pass of packed attention, the gather of the keys included."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = sum(layout.query_lengths)
    shapes = [(1, sizes.num_heads, rows, sizes.head_dim), (1, sizes.num_kv_heads, rows, sizes.head_dim)]
    shapes.append((1, sizes.num_kv_heads, rows, sizes.value_dim))
    query, key, value = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes)
    sinks = torch.zeros(sizes.num_heads, device=device, dtype=dtype, requires_grad=True) if sizes.sinks else None
    upstream = torch.randn(1, rows, sizes.num_heads, sizes.value_dim, device=device, dtype=dtype)
    leaves = [each for each in (query, key, value, sinks) if each is not None]
    layer, found = torch.nn.Identity(), []
    for _ in range(repeats + 2):
        synchronize(device)
        start = time.perf_counter()
        out, _ = packed_attention(
            layer, query, key, value, None, layout=layout, sliding_window=sizes.window, softcap=sizes.softcap,
            s_aux=sinks, kernel=kernel,
        )  # fmt: skip
        torch.autograd.grad(out, leaves, upstream)
        synchronize(device)
        found.append(time.perf_counter() - start)
    return median(found[2:])


def row_of(name: str, sizes: Sizes, layout: Layout, device: torch.device, repeats: int) -> str:
    """A line of the table."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for problem in check_kernel(device, dtype, **dataclasses.asdict(sizes)):
        print(f"warning: {problem}")
    kernel = kernel_for(device, dtype, softcap=sizes.softcap is not None, sinks=sizes.sinks)[0]
    without = dataclasses.replace(sizes, softcap=None, sinks=False, value_dim=sizes.head_dim)
    base = seconds(without, layout, device, None, repeats)
    taken = seconds(sizes, layout, device, None, repeats)
    plain = seconds(sizes, layout, device, plain_kernel, max(1, repeats // 4))
    columns = (
        f"{base * 1e3:.2f}",
        f"{taken * 1e3:.2f}",
        f"{taken / base:.2f}",
        f"{plain * 1e3:.2f}",
        f"{plain / base:.1f}",
    )
    return f"| {name} | {kernel} | " + " | ".join(columns) + " |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="a toy row on the CPU")
    parser.add_argument("--repeats", type=int, default=20, help="passes of each kernel")
    args = parser.parse_args()
    if not args.cpu and not torch.cuda.is_available():
        raise SystemExit("no GPU found; --cpu runs a toy row")
    device = torch.device("cpu" if args.cpu else "cuda")
    layout = build_layout(*(TOY_ROW if args.cpu else ROW)).to(device)
    where = "CPU" if args.cpu else torch.cuda.get_device_name()
    print(f"{where}, torch {torch.__version__}, a row of {sum(layout.query_lengths):,} tokens, forward and backward\n")
    print("| attention | kernel | plain attention, ms | ms | ratio | one pass per segment, ms | ratio |")
    print("|---|---|---|---|---|---|---|")
    for name, sizes in {"toy": TOY}.items() if args.cpu else MODELS.items():
        print(row_of(name, sizes, layout, device, args.repeats), flush=True)


if __name__ == "__main__":
    main()
