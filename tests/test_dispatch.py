"""A function's twin runs where it is installed and fits; else the plain function runs, and says why."""

import sys
from types import SimpleNamespace

import pytest
import torch

from hf_dspark import dispatch


@pytest.fixture
def double(monkeypatch):
    """A function with a twin; both say who ran."""
    monkeypatch.setattr(dispatch, "_names", [])
    ran = []

    @dispatch.with_kernel
    def double(x, *, times=2):
        """Twice as much."""
        ran.append("plain")
        return x * times

    def twin(x, *, times=2):
        ran.append("twin")
        return x * times

    def why_not(x, *, times=2):
        return "it is not doubled" if times != 2 else None

    module = SimpleNamespace(double=twin, why_not_double=why_not)
    monkeypatch.setattr(dispatch, "_import_kernels", lambda: (module, ""))
    monkeypatch.setattr(dispatch, "_kernel_devices", lambda: frozenset({torch.device("cpu")}))
    dispatch.load_kernels()
    double.ran = ran
    yield double
    monkeypatch.undo()
    dispatch.load_kernels()


X = torch.ones(3)


def test_twin_runs_where_it_fits(double):
    assert double(X).tolist() == [2, 2, 2]
    assert double.ran == ["twin"]
    assert dispatch.report() == {"double": "Triton"}
    assert double.__doc__ == "Twice as much."


def test_twins_are_looked_for_at_first_use(double, monkeypatch):
    """Plain generate() with `attn_implementation="dspark"` has no loop that would load them."""
    monkeypatch.setattr(dispatch, "_twins", {})
    monkeypatch.setattr(dispatch, "_missing", None)
    double(X)
    assert double.ran == ["twin"]


def test_plain_function_runs_for_the_twins_reason(double):
    assert double(X, times=3).tolist() == [3, 3, 3]
    assert double.ran == ["plain"]
    assert dispatch.report() == {"double": "not Triton: it is not doubled"}


def test_plain_function_runs_where_it_is_better_than_a_twin_that_fits(double, monkeypatch):
    def many(x, **settings):
        return "there are many" if len(x) > 3 else None

    def total(x):
        return x.sum()

    monkeypatch.setattr(dispatch._import_kernels()[0], "total", lambda x: "the twin's", raising=False)
    chosen = dispatch.with_kernel(total, unless=many)
    dispatch.load_kernels()
    assert chosen(X) == "the twin's"
    assert chosen(torch.ones(4)) == 4
    assert dispatch.report() == {"total": "Triton; not Triton: there are many"}


def test_switch_forces_the_plain_function_and_is_read_anew(double, monkeypatch):
    monkeypatch.setenv("HF_DSPARK_KERNELS", "0")
    dispatch.load_kernels()
    double(X)
    assert dispatch.report() == {"double": "not Triton: HF_DSPARK_KERNELS is 0"}
    monkeypatch.setenv("HF_DSPARK_KERNELS", "1")
    dispatch.load_kernels()
    double(X)
    assert double.ran == ["plain", "twin"]


def test_plain_function_runs_without_a_gpu(double, monkeypatch):
    monkeypatch.setattr(dispatch, "_kernel_devices", lambda: frozenset())
    dispatch.load_kernels()
    double(X)
    assert double.ran == ["plain"]
    assert "no NVIDIA GPU" in dispatch.report()["double"]


def test_plain_function_runs_on_tensors_that_lie_elsewhere(double, monkeypatch):
    monkeypatch.setattr(dispatch, "_kernel_devices", lambda: frozenset({torch.device("cuda", 0)}))
    dispatch.load_kernels()
    double(X)
    assert dispatch.report() == {"double": "not Triton: it is on cpu"}


@pytest.mark.parametrize("missing", ["triton", "hf_dspark.kernels"])
def test_plain_function_runs_without_triton_or_in_remote_code(missing, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("hf_dspark.kernels")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    dispatch._import_kernels.cache_clear()
    monkeypatch.setattr(dispatch, "_kernel_devices", lambda: frozenset({torch.device("cpu")}))
    dispatch.load_kernels()
    assert dispatch._twins == {}
    assert dispatch._missing == f"{missing} is not installed (pip install hf-dspark[kernels])"
    monkeypatch.undo()
    dispatch._import_kernels.cache_clear()
    dispatch.load_kernels()


def test_a_new_call_forgets_the_notes_and_keeps_the_twins(double):
    double(X)
    before = dispatch._twins
    dispatch.load_kernels()
    assert dispatch.report() == {}
    assert dispatch._twins is before  # the guards of compiled graphs hold


def test_lost_speed_is_said_once_in_the_log(monkeypatch):
    said = []
    monkeypatch.setattr(dispatch.logger, "warning_once", said.append)
    dispatch.load_kernels()
    for _ in range(2):
        dispatch.note("double", "not Triton: head size 80", is_loss=True)
        dispatch.note("double", "packed")
    assert said == ["double: not Triton: head size 80."]
    assert dispatch.report() == {"double": "not Triton: head size 80; packed"}


def test_a_trace_notes_as_it_is_made_and_what_was_noted_is_remembered(double):
    compiled = torch.compile(double, backend="eager", fullgraph=True)
    kept = {}
    for calls in range(3):
        for times in (2, 3):
            double.ran.clear()  # by which it would be traced again
            assert compiled(X, times=times).tolist() == [times] * 3
        expected = {"double": "Triton; not Triton: it is not doubled"}
        assert dispatch.report() == (expected if calls == 0 else {})
        dispatch.remember(kept)
        assert dispatch.report() == expected
        dispatch.load_kernels()
