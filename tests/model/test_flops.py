"""The necessary arithmetic, against counts worked out by hand and against torch's counter."""

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from toys import toy_model

from notus.model.flops import Dimensions, dimensions, forward_flops, visible_pairs


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
