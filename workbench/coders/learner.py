"""One training step after another: a coder with its optimiser, its schedule, its scale and the record of dead features.

A learner knows nothing of where rows come from; arrays (``estimators.py``) and models (``train.py``) are trained by the same
steps. Its whole state is tensors and plain labels, so that a training goes on where it stopped, to the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from workbench.coders.coder import Coder, Progress
from workbench.coders.start import begin
from workbench.errors import UnknownName, WorkbenchError

NORMALISE = ("expected", "none")
_DEAD_AFTER = 10_000_000
_WARM, _COOL = 0.02, 0.2
_CLIP = 1.0
_REDRAWN = 0.9
_LEAST = 8
_ALONG = 0.3


def default_rate(features: int) -> float:
    """Adam's rate, which falls with the width of the dictionary as 1 / sqrt(F) (Gao et al. 2024): 3e-4 at 2^14 features, at most
    2e-3."""
    return min(2e-3, 3e-4 * (2**14 / features) ** 0.5)


class Learner:
    """Trains ``coder`` for ``steps`` steps of ``learner.step(x, y)`` on batches of about ``rows`` rows.

    ``rate``: Adam's peak rate, with a warm-up over the first fiftieth and a linear decay over the last fifth of the steps.
    ``normalise="expected"`` scales x and y (each part of a crosscoder by itself) so that their mean norm is sqrt(D); the scale
    is folded into the weights at the end. ``start``: see ``start.begin``. ``dead_after``: rows after which a silent feature is
    dead, by default 10 million, in short trainings a tenth of all rows. ``redraws`` times in a training (at most every eighth
    step, and not in the last tenth), features that were silent since the time before are drawn anew in the direction of what
    rows that are explained badly have left (Bricken et al. 2023).
    """

    def __init__(
        self,
        coder: Coder,
        *,
        steps: int,
        rows: int,
        rate: float | None = None,
        seed: int = 0,
        normalise: str = "expected",
        start: str = "active-subspace",
        dead_after: int | None = None,
        redraws: int = 100,
    ) -> None:
        if steps < 1 or rows < 1:
            raise WorkbenchError(f"a training has at least one step of one row; got steps={steps}, rows={rows}")
        if normalise not in NORMALISE:
            raise UnknownName("normalisation", normalise, NORMALISE)
        self.coder, self.steps, self.start_from, self.normalise = coder, steps, start, normalise
        self.rate = default_rate(coder.features) if rate is None else rate
        self.dead_after = dead_after or min(_DEAD_AFTER, max(10 * rows, steps * rows // 10))
        self.generator = torch.Generator().manual_seed(seed)
        device, dtype = coder.b_dec.device, coder.b_dec.dtype
        self.scale_in = torch.ones(coder.d_in, device=device, dtype=dtype)
        self.scale_out = torch.ones(coder.d_out, device=device, dtype=dtype)
        self.silent = torch.zeros(coder.features, dtype=torch.int64, device=device)
        self.at, self.begun = 0, False
        fused = device.type in ("cpu", "cuda")
        self.optimiser = torch.optim.Adam(coder.parameters(), lr=self.rate, betas=(0.9, 0.999), fused=fused)
        self.redraw_every, self.rows = max(_LEAST, steps // redraws) if redraws else 0, rows

    def start(self, x: Tensor, y: Tensor | None = None) -> None:
        """Take scale, biases and directions from the first rows; ``step`` does so itself if it was not done."""
        y = x if y is None else y
        if self.normalise == "expected":
            self.scale_in = _scale(x, self.coder.reads)
            self.scale_out = self.scale_in if y is x else _scale(y, self.coder.writes)
        scaled = x * self.scale_in
        begin(self.coder, scaled, scaled if y is x else y * self.scale_out, self.start_from, self.generator)
        self._unit_rows()
        self.begun = True

    def step(self, x: Tensor, y: Tensor | None = None) -> dict[str, float]:
        """One step on rows x ``[N, D_in]`` (and y ``[N, D_out]`` of a transcoder). Gives ``loss`` and its parts, in scaled units,
        ``l0`` (active features per row), ``fvu`` (squared error as a share of the batch's variance), ``dead`` (share of
        features) and ``rate``. Refuses rows that are not finite."""
        if self.at >= self.steps:
            raise WorkbenchError(f"this training of {self.steps} steps is over; call finish()")
        if not self.begun:
            self.start(x, y)
        scaled = x * self.scale_in
        target = scaled if y is None else y * self.scale_out
        rate = self.rate * self._schedule()
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        with torch.enable_grad():
            terms = self.coder.objective(scaled, target, self.now)
            self.optimiser.zero_grad(set_to_none=True)
            terms.loss.backward()
        loss = float(terms.loss.detach())
        if loss != loss or loss in (float("inf"), float("-inf")):
            raise WorkbenchError(
                f"step {self.at}: the loss is {loss}: the rows hold NaN or infinities, or the rate {self.rate:g} is too large"
            )
        self._tangent()
        torch.nn.utils.clip_grad_norm_(self.coder.parameters(), _CLIP * self.coder.d_out**0.5)
        self.optimiser.step()
        self._unit_rows()
        with torch.no_grad():
            self.silent = torch.where(terms.active > 0, 0, self.silent + len(x))
            error = (terms.output - target).pow(2).sum()
            spread = (target - target.mean(0)).pow(2).sum().clamp(min=1e-30)
            dead = (self.silent >= self.dead_after).float().mean()
        found = {
            "loss": loss,
            **{name: float(part.detach()) for name, part in terms.parts.items()},
            "l0": float(terms.active.sum()) / len(x),
            "fvu": float(error / spread),
            "dead": float(dead),
            "rate": rate,
        }
        self.at += 1
        if self.redraw_every and self.at % self.redraw_every == 0 and self.at <= _REDRAWN * self.steps:
            found["redrawn"] = float(self._redraw(scaled, target, terms.output.detach()))
        return found

    @property
    def now(self) -> Progress:
        return Progress(self.at, self.steps, self.silent, self.dead_after)

    def finish(self) -> Coder:
        """The trained coder, which takes and gives rows as they are; the learner is of no further use."""
        coder = self.coder.eval()
        coder.fold(self.scale_in, self.scale_out)
        coder.requires_grad_(False)
        self.steps = self.at
        return coder

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that ``restore`` needs, as tensors by name and labels that are JSON."""
        tensors = {f"coder.{name}": value.detach().clone() for name, value in self.coder.state_dict().items()}
        for i, held in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{i}.{name}": value.detach().clone() for name, value in held.items()}
        tensors |= {name: getattr(self, name).clone() for name in ("scale_in", "scale_out", "silent")}
        tensors["generator"] = self.generator.get_state()
        return tensors, {"at": self.at, "begun": self.begun}

    def restore(self, tensors: Mapping[str, Tensor], labels: Mapping[str, Any]) -> None:
        """Become what a learner of the same coder, steps and seed was when it gave this state."""
        prefix = "coder."
        weights = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        self.coder.load_state_dict(weights)
        groups = self.optimiser.state_dict()
        held: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimiser."):
                _, index, key = name.split(".", 2)
                held.setdefault(int(index), {})[key] = value.clone()
        self.optimiser.load_state_dict({**groups, "state": held})
        device = self.coder.b_dec.device
        for name in ("scale_in", "scale_out", "silent"):
            setattr(self, name, tensors[name].to(device).clone())
        self.generator.set_state(tensors["generator"].cpu())
        self.at, self.begun = int(labels["at"]), bool(labels["begun"])

    def _schedule(self) -> float:
        warm = min(1.0, (self.at + 1) / max(1.0, _WARM * self.steps))
        left = (self.steps - self.at) / max(1.0, _COOL * self.steps)
        return warm * min(1.0, left)

    @torch.no_grad()
    def _tangent(self) -> None:
        """Rows of W_dec that keep norm 1 do not move along themselves."""
        grad = self.coder.W_dec.grad
        if self.coder.unit_decoder and grad is not None:
            rows = self.coder.W_dec
            grad.addcmul_((grad * rows).sum(1, keepdim=True), rows, value=-1)

    @torch.no_grad()
    def _unit_rows(self) -> None:
        if self.coder.unit_decoder:
            self.coder.W_dec.div_(self.coder.W_dec.norm(dim=1, keepdim=True).clamp(min=1e-12))

    @torch.no_grad()
    def _redraw(self, x: Tensor, target: Tensor, output: Tensor) -> int:
        """Draw anew what was silent since the last time: each feature picks a row with its squared error as probability, writes
        what is left of it unexplained, and reads the same direction (in a transcoder that of the row), as strongly as
        ``coder.strength`` says. Moments in the optimiser start anew."""
        coder = self.coder
        dead = (self.silent >= self.redraw_every * self.rows).nonzero().squeeze(1)
        if not len(dead):
            return 0
        left = target - output
        odds = left.pow(2).sum(1).double().cpu()
        picked = torch.multinomial(odds, len(dead), replacement=True, generator=self.generator).to(x.device)
        middle = x.mean(0) if coder.centre is None else coder.centre
        seen = x[picked] - middle
        size = left[picked].norm(dim=1).clamp(min=1e-12)
        read = seen / seen.norm(dim=1, keepdim=True).clamp(min=1e-12)
        write = left[picked] / size[:, None]
        if (
            coder.centred
        ):  # read what is written, unless the row hardly points there and would have to be amplified to be seen
            read = torch.where((read * write).sum(1, keepdim=True) < _ALONG, read, write)
        along = (seen * read).sum(1).clamp(min=1e-12)
        alive = self.silent == 0
        usual = coder.W_enc[:, alive].norm(dim=0).mean() if bool(alive.any()) else coder.W_enc.norm(dim=0).mean()
        # Never longer than those that live: each time a little longer would be without bound.
        coder.W_enc[:, dead] = (coder.strength(x[picked], size, dead) / along).minimum(usual)[None] * read.T
        coder.W_dec[dead] = write
        coder.b_enc[dead] = 0.0 if coder.centred else -middle @ coder.W_enc[:, dead]
        self.silent[dead] = 0
        for parameter, axis in ((coder.W_enc, 1), (coder.W_dec, 0), (coder.b_enc, 0)):
            for name in ("exp_avg", "exp_avg_sq"):
                self.optimiser.state[parameter][name].index_fill_(axis, dead, 0.0)
        return len(dead)


def _scale(rows: Tensor, parts: tuple[int, ...]) -> Tensor:
    """Per width the factor ``[D]`` that brings the mean norm of each part to the square root of its width."""
    factors = [
        torch.full((width,), float(width**0.5 / part.norm(dim=1).mean().clamp(min=1e-30)))
        for width, part in zip(parts, rows.split(parts, 1), strict=True)
    ]
    return torch.cat(factors).to(rows)
