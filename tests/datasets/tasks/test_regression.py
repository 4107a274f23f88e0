"""Regression in context: lines in text, and vectors against closed forms."""

import random

import pytest
import task_cases_symbolic as cases
import torch

import workbench as wb
from workbench.datasets.pairs import in_split
from workbench.datasets.regression import least_squares, regression_batch, ridge
from workbench.datasets.tokenizer import word_tokenizer
from workbench.errors import Refused, UnknownName, WorkbenchError


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.mark.parametrize("options", [options for name, options in cases.CASES if name == "regression"])
def test_answers_follow_from_the_text_and_flip(options, tokenizer):
    task = wb.task("regression", **options)
    pairs = task.build(1, tokenizer, 80)
    assert set(pairs.labels["slope"]) == {-4, -3, -2, -1, 1, 2, 3, 4}
    for i, text in enumerate(pairs.texts):
        right = tokenizer.convert_ids_to_tokens(pairs.answer[i, 0].item())
        wrong = tokenizer.convert_ids_to_tokens(pairs.wrong[i, 0].item())
        other = cases.DERIVE["regression"](tokenizer.decode(pairs.corrupt[i], skip_special_tokens=True))
        y = pairs.labels["slope"][i] * pairs.labels["x"][i] + pairs.labels["intercept"][i]
        assert cases.DERIVE["regression"](text) == {right} == {f"{y:02d}"}
        assert other == ({wrong} if task.corruption == "coefficients" else set())
        for j in range(task.examples):
            for ids, same in ((pairs.spans[f"X{j}"][i, 0], True), (pairs.spans[f"Y{j}"][i, 0], False)):
                assert not same or pairs.clean[i, ids] == pairs.corrupt[i, ids]


def test_lines_of_a_split_stay_in_it():
    for split in ("train", "test"):
        rng = random.Random(0)
        for _ in range(100):
            points = wb.task("regression", split=split, examples=2).draw(rng).corrupt.replace(":", ",").split(",")
            (x0, y0, x1, y1) = map(int, points[:4])
            slope = (y1 - y0) // (x1 - x0)
            assert in_split(f"{slope} {y0 - slope * x0}", split)


def test_impossible_options_are_refused():
    for option in ({"examples": 1}, {"examples": 20}, {"corruption": "scatter", "examples": 2}):
        with pytest.raises(WorkbenchError, match=f"got {option['examples']}"):
            wb.task("regression", **option)
    with pytest.raises(UnknownName, match="coefficients, scatter"):
        wb.task("regression", corruption="noise")
    assert wb.task("regression").contrast().corruption == "scatter"
    for option in ({"width": 0}, {"examples": 0}, {"noise": -1.0}):
        with pytest.raises(WorkbenchError, match="got"):
            regression_batch(2, torch.Generator(), **option)
    few = regression_batch(2, torch.Generator(), examples=3)
    with pytest.raises(Refused, match="3 points leave 5 weights open"):
        least_squares(few)
    with pytest.raises(WorkbenchError, match="got -1"):
        ridge(few, -1.0)


def test_rows_hold_their_function():
    batch = regression_batch(500, torch.Generator().manual_seed(0), noise=0.0)
    assert batch.tokens.shape == (500, 41, 6)
    for x, y, w in zip(batch.x, batch.y, batch.weights, strict=True):
        assert (x @ w - y).abs().max() < 1e-5
    assert torch.allclose((batch.query * batch.weights).sum(1), batch.target, atol=1e-5)
    assert (batch.tokens[:, -1, -1] == 0).all()
    assert batch.target.var() == pytest.approx(1, abs=0.15)
    noisy = regression_batch(500, torch.Generator().manual_seed(0), noise=0.5)
    assert (noisy.y - torch.einsum("nld,nd->nl", noisy.x, noisy.weights)).std() == pytest.approx(0.5, rel=0.03)


def test_baselines_against_row_by_row_solutions():
    batch = regression_batch(40, torch.Generator().manual_seed(1), examples=12, noise=0.3)
    for i in range(40):
        x, y, q = batch.x[i].double(), batch.y[i].double(), batch.query[i].double()
        plain = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
        assert least_squares(batch)[i] == pytest.approx((q @ plain).item(), abs=1e-4)
        # Ridge is least squares on rows extended by sqrt(penalty) I with targets 0.
        longer = torch.cat([x, 0.7**0.5 * torch.eye(5, dtype=torch.double)])
        shrunk = torch.linalg.lstsq(longer, torch.cat([y, y.new_zeros(5)])[:, None]).solution[:, 0]
        assert ridge(batch, 0.7)[i] == pytest.approx((q @ shrunk).item(), abs=1e-4)


def test_the_posterior_mean_is_the_best_ridge():
    batch = regression_batch(20_000, torch.Generator().manual_seed(2), examples=8, noise=0.5)
    best = 5 * 0.5**2
    errors = {p: (ridge(batch, p) - batch.target).pow(2).mean().item() for p in (0.0, best / 4, best, 4 * best)}
    assert min(errors, key=errors.get) == best
    exact = regression_batch(200, torch.Generator().manual_seed(3), noise=0.0)
    assert (least_squares(exact) - exact.target).abs().max() < 1e-4
