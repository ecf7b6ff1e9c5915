"""The sums that every mean of shares is made of."""

import pytest
import torch

from localist_hf.evaluation.measure import everything
from localist_hf.evaluation.share_sums import SUMS, add_rows, means_of_lists, share_means, share_sums
from localist_hf.modeling.measurements import OF_BLOCKS, SHARES


@pytest.fixture
def outputs(make_model, make_text):
    model = make_model(num_sink_tokens=1, num_previous_blocks=1)
    mask = torch.ones(3, 60, dtype=torch.long)
    mask[0, :17], mask[2, 50:] = 0, 0
    with torch.no_grad():
        return model(make_text(3, 60), attention_mask=mask, **everything({}))


def test_they_are_of_counted_positions_and_of_tokens(outputs) -> None:
    sums = share_sums(outputs, by_head=True)
    assert tuple(sums) == SUMS
    for layer, (mask, starts) in enumerate(zip(outputs.fidelity_mask, outputs.block_starts, strict=True)):
        for row in range(3):
            counted, is_token = mask[row], starts[row] >= 0
            others = outputs.block_share[layer][row] + outputs.outside_share[layer][row]
            for name in (*SHARES, *OF_BLOCKS):
                values = outputs[name][layer][row] * (others if name in OF_BLOCKS else 1)
                expected = values[:, counted].sum(-1)
                torch.testing.assert_close(sums[name][row, layer], expected)
            torch.testing.assert_close(sums["entropy"][row, layer], outputs.entropy[layer][row][:, is_token].sum(-1))
            counts = {
                "visible_keys": outputs.visible_keys[layer][row][counted].sum(),
                "num_counted": counted.sum(),
                "num_tokens": is_token.sum(),
                "num_blocks": len(set(starts[row].tolist()) - {-1}),
            }
            assert {name: sums[name][row, layer].item() for name in counts} == counts


def test_without_heads_they_are_the_means_over_them(outputs) -> None:
    by_head, sums = share_sums(outputs, by_head=True), share_sums(outputs)
    for name in SUMS:
        assert sums[name].shape == (3, 4, 1)
        torch.testing.assert_close(
            sums[name].double(), by_head[name].double().mean(-1, keepdim=True), rtol=1e-5, atol=0
        )


def test_other_positions_can_be_counted_and_what_was_not_measured_left_out(outputs) -> None:
    masks = [mask & (torch.arange(60) % 2 == 0) for mask in outputs.fidelity_mask]
    outputs.entropy = outputs.blocks_looked_at = outputs.top_block_share = None
    sums = share_sums(outputs, masks)
    assert set(SUMS) - set(sums) == {"entropy", *OF_BLOCKS}
    assert not {"entropy", *OF_BLOCKS} & share_means(add_rows(sums)).keys()
    assert sums["num_counted"][..., 0].tolist() == torch.stack([mask.sum(1) for mask in masks], 1).tolist()
    expected = outputs.block_share[3].mean(1)[masks[3]].sum()
    torch.testing.assert_close(sums["block_share"][:, 3].sum(), expected)


def test_rows_and_batches_add_up(outputs) -> None:
    sums = share_sums(outputs)
    apart = None
    for row in range(3):
        apart = add_rows({name: each[row : row + 1] for name, each in sums.items()}, apart)
    together = add_rows(sums)
    for name, total in together.items():
        assert total.dtype == torch.float64
        torch.testing.assert_close(apart[name], total)


def test_means_of_numbers_and_of_none() -> None:
    shares = dict(zip(SHARES, ([0.5, 0.25], [0.0, 0.0], [0.25, 0.25], [0.25, 0.5]), strict=True))
    means = means_of_lists(shares)
    assert means["context_fidelity"] == pytest.approx(0.5 / 1.25)
    assert (means["fidelity"], means["context_share"]) == (0.625, 0.625)
    nothing = means_of_lists({name: [] for name in SHARES})
    assert nothing.pop("fidelity") == 1
    assert all(value != value for value in nothing.values())
