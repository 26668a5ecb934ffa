"""Names that moved go on working, with one warning that says where they are now."""

from __future__ import annotations

import importlib
import sys
import warnings

import pytest

from corrdit import MOVED


def by_name(module: str, attribute: str) -> object:
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


@pytest.mark.parametrize("old", sorted(MOVED))
def test_old_name_gives_the_object_of_the_new_one(old, monkeypatch):
    module, _, attribute = old.partition(":")
    home, _, name = MOVED[old].partition(":")
    # As in a process that has not used the old name yet.
    monkeypatch.delitem(sys.modules, module if not attribute else "", raising=False)
    if attribute:
        vars(importlib.import_module(module)).pop(attribute, None)
    with pytest.warns(DeprecationWarning, match=f"{home.split('.')[-1]}.*0.3"):
        found = by_name(module, attribute)
    expected = importlib.import_module(home)
    assert found is (getattr(expected, name) if name else expected)
    assert expected.__spec__.name == home


def test_a_second_use_does_not_warn_again():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from corrdit.data import WorldConfig
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from corrdit.data import WorldConfig as again
    assert again is WorldConfig


def test_modules_below_a_moved_package_are_found():
    sys.modules.pop("corrdit.integrations.diffusers.embedded.codec", None)
    with pytest.warns(DeprecationWarning, match="embedded.codec is now"):
        old = importlib.import_module("corrdit.integrations.diffusers.embedded.codec")
    assert old is importlib.import_module("corrdit.integrations.embedded.codec")


def test_other_names_are_still_refused():
    import corrdit.data

    with pytest.raises(AttributeError, match="no_such_name"):
        _ = corrdit.data.no_such_name
