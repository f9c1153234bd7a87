"""Patches by one matrix product are the convolution's, and what is no such convolution stays one."""

from __future__ import annotations

import pytest
import torch
from timm.layers import StdConv2d
from torch import nn

from vpt_fast.backbones.patches import PatchProjection, as_product


def convolution(kernel: tuple[int, int], bias: bool = True, channels: int = 3) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(channels, 10, kernel, stride=kernel, bias=bias).double()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(
    ("kernel", "size", "channels"),
    [((4, 4), (8, 12), 3), ((7, 3), (21, 9), 1), ((5, 5), (13, 19), 4), ((1, 1), (2, 3), 3)],
    ids=["square", "oblong", "pixels_left_over", "single_pixels"],
)
def test_output_and_gradient_of_images_are_those_of_the_convolution(
    kernel: tuple[int, int], size: tuple[int, int], channels: int, bias: bool
) -> None:
    plain = convolution(kernel, bias, channels)
    product = as_product(plain)
    assert isinstance(product, PatchProjection)
    images = torch.randn(2, channels, *size, dtype=torch.float64, requires_grad=True)
    expected, actual = plain(images), product(images)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, images, grad), torch.autograd.grad(expected, images, grad)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_images_are_rounded_to_the_dtype_of_the_weights(dtype: torch.dtype) -> None:
    product = as_product(convolution((4, 4))).to(dtype)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    tokens = product(images)
    assert tokens.dtype == dtype
    assert torch.equal(tokens, product(images.to(dtype)))


def test_under_autocast_images_are_rounded_once() -> None:
    plain = convolution((4, 4)).float()
    images = torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        tokens, expected = as_product(plain)(images), plain(images)
    assert tokens.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(tokens, expected, rtol=1e-2, atol=1e-2)


def test_tokens_lie_one_after_the_other() -> None:
    tokens = as_product(convolution((4, 4)))(torch.randn(2, 3, 8, 12).double())
    assert tokens.flatten(2).transpose(1, 2).is_contiguous()


def test_images_and_weights_with_channels_last_give_the_same() -> None:
    plain = convolution((4, 4))
    images = torch.randn(2, 3, 8, 12).double()
    expected = plain(images)
    product = as_product(plain).to(memory_format=torch.channels_last)
    torch.testing.assert_close(product(images.to(memory_format=torch.channels_last)), expected)


def test_parameters_are_the_convolutions_own() -> None:
    plain = convolution((4, 4))
    product = as_product(plain)
    assert product.weight is plain.weight and product.bias is plain.bias
    assert product.state_dict().keys() == plain.state_dict().keys()


OTHERS = {
    "overlap": lambda: nn.Conv2d(3, 8, 4, stride=2),
    "gaps": lambda: nn.Conv2d(3, 8, 2, stride=4),
    "padding": lambda: nn.Conv2d(3, 8, 4, stride=4, padding=1),
    "dilation": lambda: nn.Conv2d(3, 8, 2, stride=2, dilation=2),
    "groups": lambda: nn.Conv2d(4, 8, 2, stride=2, groups=2),
    "standardised": lambda: StdConv2d(3, 8, 4, stride=4),
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_what_is_no_product_of_patches_stays_a_convolution(make) -> None:
    plain = make()
    assert as_product(plain) is plain
