"""A model with a planted copy-suppression head, its copying twin, a head that takes tokens away evenly, and a silent one."""

import torch

from workbench.models.native import NativeModel
from workbench.models.native_net import NativeConfig, NativeNet

V = 16


def copy_suppressor() -> NativeModel:
    """Layer 0 predicts the successor of every token. In layer 1, head 0 looks for the predicted token and takes it away, head 1
    adds it, head 2 attends evenly and takes tokens away, head 3 is silent."""
    config = NativeConfig(
        layers=2, heads=4, width=2 * V, head_width=V, vocab=V, positions="none", norm="none", scale=1.0, context=128
    )
    net = NativeNet(config).double()
    eye, zero = torch.eye(V, dtype=torch.float64), torch.zeros(V, V, dtype=torch.float64)
    token, out = torch.cat([eye, zero]), torch.cat([zero, eye])
    with torch.no_grad():
        for weight in net.parameters():
            weight.zero_()
        net.W_E.copy_(token.T)
        net.W_U.copy_(out)
        first, second = (block.attn for block in net.blocks)
        first.W_Q[0], first.W_K[0], first.W_V[0] = 30 * token, token, token
        first.W_O[0] = 4 * (out @ eye.roll(1, 0)).T
        for head, sign in ((0, -1.5), (1, 1.5)):
            second.W_Q[head], second.W_O[head] = 10 * out, sign * out.T
            second.W_K[head], second.W_V[head] = token, token
        second.W_V[2], second.W_O[2] = token, -out.T
    return NativeModel(net.eval(), name="planted")
