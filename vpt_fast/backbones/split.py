"""Cutting a timm network in two where its frozen layers end, so that what they compute can be kept."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from vpt_fast.backbones.layers import on_meta


@dataclass(frozen=True)
class Split:
    """A network's `forward_features` in two parts, which name its modules but do not hold them.

    Attributes:
        frozen: images (B, C, H, W) to the one tensor that the trained layers read, (B, *shape).
        trained: that tensor to the last feature map.
        shape: for one image.
    """

    frozen: fx.Graph
    trained: fx.Graph
    shape: tuple[int, ...]

    def run_frozen(self, network: nn.Module, images: torch.Tensor) -> torch.Tensor:
        return fx.Interpreter(network, graph=self.frozen).run(images)

    def run_trained(self, network: nn.Module, tensor: torch.Tensor) -> torch.Tensor:
        return fx.Interpreter(network, graph=self.trained).run(tensor)


def split_network(network: Any, image: torch.Tensor) -> Split | None:
    """The split of a timm network by the `requires_grad` of its parameters; `image`: an input (1, C, H, W) on
    the meta device.

    None if no layer is frozen, if the trained layers read several tensors of the frozen ones (as in a
    DenseNet, where a layer reads the outputs of all before it), or if a class that is not timm's says which
    layers are called.

    Tracing is not safe while another thread calls or traces a module.
    """
    if not _is_followed(type(network).forward_features):
        return None
    graph = _Tracer().trace(network)
    (images,), (output,) = graph.find_nodes(op="placeholder"), graph.find_nodes(op="output")
    trained = {output}  # as it is read by the head, and in some networks by layers before it
    for node in graph.nodes:  # in the order of execution
        if _holds_trained(network, node) or not trained.isdisjoint(node.all_input_nodes):
            trained.add(node)
    borders = [n for n in graph.nodes if n not in trained and not trained.isdisjoint(n.users)]
    if len(borders) != 1 or borders == [images]:
        return None
    first = _part((n for n in graph.nodes if n not in trained and n is not images), images, borders[0])
    second = _part((n for n in graph.nodes if n in trained and n is not output), borders[0], output.args[0])
    found = fx.Interpreter(on_meta(network), graph=first).run(image)
    # A SelecSLS's layers hand on lists of tensors.
    return Split(first, second, tuple(found.shape[1:])) if isinstance(found, torch.Tensor) else None


class _Tracer(fx.Tracer):
    """Enters a module only if some of its parameters are trained and some are not, so little of a network's
    Python code is followed: that of its containers."""

    traced_func_name = "forward_features"

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        is_mixed = len({p.requires_grad for p in module.parameters()}) == 2
        return not (is_mixed and _is_followed(type(module)))


def _is_followed(code: Any) -> bool:
    """Whether tracing follows this class or function: others might decide by the images or by the mode."""
    return code.__module__.partition(".")[0] in ("timm", "torch")


def _holds_trained(network: nn.Module, node: fx.Node) -> bool:
    name: Any = node.target
    if node.op == "get_attr":
        return network.get_parameter(name).requires_grad
    return node.op == "call_module" and any(p.requires_grad for p in network.get_submodule(name).parameters())


def _part(nodes: Iterable[fx.Node], given: fx.Node, result: fx.Node) -> fx.Graph:
    """The graph of `nodes` alone, from `given` to `result`."""
    graph = fx.Graph()
    copies = {given: graph.placeholder("tensor")}
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[result])
    return graph
