"""What a model's weights are, however an engine holds them."""

from collections import defaultdict

from torch import nn


def tied_names(module: nn.Module) -> set[frozenset[str]]:
    """The names of each parameter that has several."""
    names = defaultdict(set)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names[id(parameter)].add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


def trained_numbers(module: nn.Module) -> int:
    """How many numbers are trained, over all workers; ZeRO-3 leaves none in the parameters themselves."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters() if p.requires_grad)
