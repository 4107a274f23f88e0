import math

import torch

from workbench.kernels.selfcheck import compare, lse_selfcheck


def test_backends_of_this_machine_return_natural_logs() -> None:
    found = lse_selfcheck()
    assert {"flash (cpu)", "flex (uncompiled)", "workbench reference", "workbench cpu"} <= set(found)
    for name, check in found.items():
        assert check.status in (("ok",) if "cuda" not in name else ("ok", "absent")), f"{name}: {check}"
        assert check.status == "absent" or (check.error is not None and check.error < 1e-4)


def test_an_lse_in_base_two_is_told_apart() -> None:
    exact = torch.linspace(-3, 5, 12, dtype=torch.float64).view(1, 2, 6)
    assert compare("good", exact.float(), exact).status == "ok"
    base_two = compare("base two", exact / math.log(2), exact)
    assert base_two.status == "wrong"
    assert "base 2" in str(base_two)
    assert compare("off", exact + 0.01, exact).status == "wrong"
    assert compare("shape", exact[0], exact).status == "wrong"
