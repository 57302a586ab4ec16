"""Forwards whose norm bnext.convert must not fuse; registered among those of convert_forwards."""

from __future__ import annotations

import torch
from convert_forwards import not_followed
from torch.nn import functional as F


@not_followed
def used_twice(self, x):
    y = self.bn(self.conv(x))
    return self.relu(y) * torch.sigmoid(y)


@not_followed
def used_later(self, x):
    y = self.bn(self.conv(x))
    z = self.relu(y)
    return z * 2 + y


@not_followed
def used_in_the_next_round(self, x):
    y = x
    for _ in range(2):
        z = y.abs()
        y = self.bn(self.conv(x))
        x = self.relu(y) + z
    return x


@not_followed
def used_by_a_function(self, x):
    y = self.bn(self.conv(x))
    later = lambda: y  # noqa: E731
    z = self.relu(y)
    return z + later()


@not_followed
def another_name(self, x):
    y = same = self.bn(self.conv(x))
    return self.relu(y) + same


@not_followed
def kept(self, x):
    self.output = self.bn(self.conv(x))
    return self.relu(self.output) - self.output


@not_followed
def steep_leaky(self, x):
    return self.steep(self.bn(self.conv(x)))


@not_followed
def steep_functional(self, x):
    return F.leaky_relu(self.bn(self.conv(x)), negative_slope=0.2)


@not_followed
def tanh(self, x):
    return self.tanh(self.bn(self.conv(x)))


@not_followed
def returned(self, x):
    return self.bn(self.conv(x))


@not_followed
def alpha(self, x):
    return self.relu(torch.add(self.bn(self.conv(x)), x, alpha=2))


@not_followed
def number(self, x):
    return self.relu(self.bn(self.conv(x)) + 1)


@not_followed
def doubled(self, x):
    y = self.bn(self.conv(x))
    return self.relu(y + y)


@not_followed
def attribute_as_number(self, x):
    return self.relu(self.bn(self.conv(x)) + self.scale)


# torch too refuses to train with the input of a norm, or its statistics, changed in place.
WITHOUT_GRAD = [
    "input_changed_between",
    "input_changed_by_what_is_added",
    "input_changed_by_a_module",
    "statistics_read_between",
    "in_place_by_position",
]


@not_followed
def input_changed_between(self, x):
    y = x * 1
    z = self.bn(y)
    y.mul_(2)
    return torch.relu(z + y)


@not_followed
def input_changed_by_what_is_added(self, x):
    y = x * 1
    return torch.relu(self.bn(y) + y.mul_(2))


@not_followed
def input_changed_by_a_module(self, x):
    y = x * 1
    z = self.bn(y)
    shortcut = self.relu_in_place(y)
    return torch.relu(z + shortcut)


@not_followed
def mode_changed_between(self, x):
    y = self.bn(self.conv(x))
    previous = torch.is_grad_enabled()
    torch.set_grad_enabled(previous)
    z = self.twice(x)
    return self.relu(y + z)


@not_followed
def statistics_read_between(self, x):
    y = self.bn(self.conv(x))
    bias = self.bn.running_mean.clone().view(1, -1, 1, 1).expand_as(x)
    self.bn.reset_running_stats()
    return self.relu(y + bias)


@not_followed
def test_of_a_name_that_was_set_again(self, x):
    y = self.bn(self.conv(x))
    drop = self.nothing
    drop = x.dim() if drop is None else drop
    if drop is not None:
        y = y * 2
    return self.relu(y)


@not_followed
def norm_used_between(self, x):
    y = self.bn(self.conv(x))
    shortcut = self.again(x)
    return self.relu(y + shortcut)


@not_followed
def statistics_added(self, x):
    return self.relu(self.bn(self.conv(x)) + self.bn.running_mean.view(1, -1, 1, 1))


@not_followed
def own_class(self, x):
    y = self.relu(self.bn(self.conv(x)))
    return y if type(self).__name__.startswith("Block") else -y


@not_followed
def output_caught(self, x):
    y = x
    try:
        y = self.bn(self.conv(x))
        y = self.relu(y)
    except RuntimeError:
        pass
    return y


@not_followed
def conditional_expression(self, x):
    y = self.bn(self.conv(x))
    return self.relu(y) if not self.inplace else x


@not_followed
def short_circuit(self, x):
    y = self.bn(self.conv(x))
    return x if self.inplace or self.relu(y).sum() > 0 else -x


@not_followed
def in_a_match(self, x):
    y = self.bn(self.conv(x))
    match self.inplace:
        case False:
            return self.relu(y)
    return x


@not_followed
def in_place_by_position(self, x):
    x = x * 1
    y = self.bn(x)
    z = F.relu(x, True)
    return self.relu(y + z)


@not_followed
def method_named_as_a_tensors(self, x):
    y = self.bn(self.conv(x))
    return self.relu(y + self.expand(x))


@not_followed
def alias_of_a_buffer(self, x):
    mean = self.bn.running_mean
    y = self.bn(self.conv(x))
    return self.relu(y + torch.sum(mean * 2))
