"""What the blocks of the CIFAR networks do with their input beside convolving it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distill.models.cifar_blocks import (
    BasicBlock,
    Bottleneck,
    PreActBlock,
    ShuffleV1Block,
    ShuffleV2Block,
)


def images(channels):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, channels, 9, 9, generator=generator)


@pytest.mark.parametrize(
    ("block", "channels"),
    [
        (BasicBlock, (8, 16)),
        (Bottleneck, (8, 16)),
        (PreActBlock, (8, 16)),
        (ShuffleV1Block, (24, 240)),
        (ShuffleV1Block, (240, 480)),
        (ShuffleV2Block, (24, 116)),
    ],
)
@torch.no_grad()
def test_a_strided_block_halves_the_sides_rounded_up(block, channels):
    assert block(*channels, 2).eval()(images(channels[0])).shape == (2, channels[1], 5, 5)


@pytest.mark.parametrize(("block", "last"), [(BasicBlock, "norm2"), (Bottleneck, "norm3"),
                                             (ShuffleV1Block, "norm3")])  # fmt: skip
@torch.no_grad()
def test_a_block_without_its_residual_is_a_rectifier(block, last):
    x, block = images(48), block(48, 48).eval()
    nn.init.zeros_(getattr(block, last).weight)
    assert torch.equal(block(x), x.relu())


@torch.no_grad()
def test_preact_block_carries_raw_inputs_and_projects_activated_ones():
    negative = -images(8).abs()
    identity, projection = PreActBlock(8, 8).eval(), PreActBlock(8, 16, 2).eval()
    for block in (identity, projection):
        nn.init.zeros_(block.conv2.weight)
    assert torch.equal(identity(negative), negative)
    assert not projection(negative).any()
    assert projection(-negative).any()


@torch.no_grad()
def test_a_strided_shuffle_block_hands_the_means_of_its_input_on():
    x, block = images(240), ShuffleV1Block(240, 480, 2).eval()
    means = F.conv2d(x, torch.full((240, 1, 3, 3), 1 / 9), stride=2, padding=1, groups=240)
    torch.testing.assert_close(block(x)[:, 240:], means.relu())


@torch.no_grad()
def test_the_second_shuffle_block_hands_half_of_its_input_on_between_the_other():
    x, block = images(8), ShuffleV2Block(8, 8).eval()
    assert torch.equal(block(x)[:, ::2], x[:, :4])
    changed = torch.cat([x[:, :4] + 1, x[:, 4:]], dim=1)
    assert torch.equal(block(changed)[:, 1::2], block(x)[:, 1::2])


@torch.no_grad()
def test_groups_read_every_third_of_what_the_groups_before_gave():
    """Without the shuffle a third of the input would decide a third of the output alone."""
    x, block = images(48), ShuffleV1Block(48, 48).eval()
    for norm in (block.norm1, block.norm2):
        nn.init.ones_(norm.bias)  # nothing is cut off by the rectifiers on the way
    moved = torch.cat([x[:, :16] + 1, x[:, 16:]], dim=1)
    changed = (block(moved) - block(x)).abs().amax((0, 2, 3))
    assert (changed[16:].view(2, 16).amax(dim=1) > 0).all()


@pytest.mark.parametrize("block", [ShuffleV1Block(24, 48, 2), ShuffleV1Block(48, 48),
                                   ShuffleV2Block(24, 48, 2), ShuffleV2Block(48, 48)])  # fmt: skip
@torch.no_grad()
def test_shuffling_keeps_the_layout(block):
    """One that came back plain would be laid out anew for each convolution."""
    x = images(24 if block.conv2.stride == (2, 2) else 48).to(memory_format=torch.channels_last)
    y = block.eval().to(memory_format=torch.channels_last)(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
