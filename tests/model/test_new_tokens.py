"""Rows for new tokens, and rows of merged weights, as they are sliced."""

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from notus.model.new_tokens import Rows
from notus.model.peft_format import MergedRows


def test_new_rows_are_the_mean_of_the_old_ones(tmp_path):
    save_file({"w": torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 1.0]])}, tmp_path / "w.safetensors")
    with safe_open(tmp_path / "w.safetensors", "pt") as handle:
        rows = Rows(handle.get_slice("w"), 6)
        assert rows.get_shape() == [6, 2]
        whole = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 1.0], [3.0, 3.0], [3.0, 3.0], [3.0, 3.0]])
        for start in range(6):
            for stop in range(start + 1, 7):
                assert torch.equal(rows[start:stop], whole[start:stop])


def test_a_bias_grows_too():
    assert torch.equal(Rows(torch.tensor([1.0, 2.0]), 4)[1:4], torch.tensor([2.0, 1.5, 1.5]))


def test_merged_rows_by_hand():
    # BA = [[1], [2]] [[3, 4]] = [[3, 4], [6, 8]]; W + 0.5 BA
    merged = MergedRows(
        torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [2.0]]), 0.5, torch.tensor([[1.0, 1.0], [0.0, 2.0]])
    )
    assert torch.equal(merged[0:2], torch.tensor([[2.5, 3.0], [3.0, 6.0]]))
    assert torch.equal(merged[1:2], torch.tensor([[3.0, 6.0]]))


def test_merged_rows_are_fp32_until_they_are_stored():
    # above 1, bf16 has steps of 2⁻⁷; 1 + 2⁻⁸ + 2⁻¹⁸ is past the middle of one
    merged = MergedRows(
        torch.ones(1, 1), torch.full((1, 1), 2**-8 + 2**-18), 1.0, torch.ones(1, 1, dtype=torch.bfloat16)
    )
    assert merged[0:1].item() == 1 + 2**-8 + 2**-18
    assert merged[0:1].bfloat16().item() == 1 + 2**-7
