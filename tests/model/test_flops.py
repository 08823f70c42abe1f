"""The necessary arithmetic, against counts worked out by hand and against torch's counter."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from toys import toy_model

from notus.model.flops import GPUS, Dimensions, dimensions, forward_flops, gpu_of_driver, visible_pairs


def test_visible_pairs_by_hand() -> None:
    # trunk 3: 1+2+3 = 6. Branch 2 after it: 4+5 = 9. Branch 1: 4. No trunk, branches 2 and 3: 3 + 6.
    assert visible_pairs(np.array([3, 0]), np.array([[2, 1], [2, 3]])).tolist() == [19, 9]


def test_dimensions_of_a_model_by_hand() -> None:
    # per layer: q and o 32*32, k and v 16*32, three of 48*32; the head 400*32
    size = dimensions(toy_model())
    assert size == Dimensions(layers=2, attention_width=32, body_weights=2 * 7680, head_weights=12800)


def test_linear_part_is_what_torch_counts() -> None:
    model = toy_model()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.arange(7)[None])
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    size = dimensions(model)
    attention = 4 * size.layers * size.attention_width * 28
    assert forward_flops(size, np.array([3]), np.array([[4]]), np.array([7])).tolist() == [counted + attention]


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H200 NVL", "h200-nvl"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA RTX A6000", "a6000"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx6000-ada"),
        ("NVIDIA L40", "l40"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA A30", "a30"),
        ("NVIDIA H20", "h20"),
        ("NVIDIA A800-SXM4-80GB", "a800"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("Quadro RTX 6000", None),
        ("Tesla T4", None),
    ],
)
def test_gpus_by_the_name_that_their_driver_gives(name: str, key: str | None) -> None:
    assert gpu_of_driver(name) is (GPUS[key] if key else None)
