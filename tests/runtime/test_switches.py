"""Optimisations can be switched off by name, in the environment or for a block of code."""

import pytest

from notus.runtime import switches


def test_everything_is_on_unless_the_environment_names_it(monkeypatch):
    monkeypatch.delenv(switches.VARIABLE, raising=False)
    assert all(switches.enabled(name) for name in switches.OPTIMISATIONS)
    monkeypatch.setenv(switches.VARIABLE, "fused_optimizer, fp32_addmm")
    off = [name for name in switches.OPTIMISATIONS if not switches.enabled(name)]
    assert off == ["fused_optimizer", "fp32_addmm"]


def test_a_context_overrides_the_environment_and_ends(monkeypatch):
    monkeypatch.setenv(switches.VARIABLE, "fp32_addmm")
    with switches.disabled("fused_optimizer"):
        assert switches.enabled("fp32_addmm")
        assert not switches.enabled("fused_optimizer")
        with switches.disabled():
            assert switches.disabled_names() == frozenset()
    assert switches.disabled_names() == {"fp32_addmm"}


def test_an_unknown_name_is_an_error_that_lists_the_known_ones(monkeypatch):
    choices = "no optimisation 'fused_everything'; commas separate names, choose from fused_elementwise"
    with pytest.raises(ValueError, match=choices), switches.disabled("fused_everything"):
        pass
    monkeypatch.setenv(switches.VARIABLE, "fused")
    with pytest.raises(ValueError, match="NOTUS_DISABLE: there is no optimisation 'fused'"):
        switches.enabled("fused_optimizer")
