"""Replacing a package's functions and putting them back."""

import sys
from collections.abc import Callable
from types import ModuleType

import pytest
from ppomax.kernels.adapters.replace import Replacements

Fake = Callable[..., ModuleType]


def theirs() -> str:
    return "theirs"


def other() -> str:
    return "other"


def ours() -> str:
    return "ours"


@pytest.fixture
def losses(fake_package: Fake) -> ModuleType:
    """peer.losses defines both; peer.trainer imported one, under another name; outside is no part of the package."""
    fake_package("peer.trainer", loss_fn=theirs)
    fake_package("peerless", loss=theirs)
    return fake_package("peer.losses", loss=theirs, other=other)


def test_replaced_wherever_the_package_holds_it(losses: ModuleType) -> None:
    replacements = Replacements("peer", {"peer.losses": {"loss": ours}})
    assert replacements.install() == ["peer.losses.loss", "peer.trainer.loss_fn"]
    assert losses.loss is ours
    assert losses.other is other
    assert replacements.original(ours) is theirs
    assert sys.modules["peerless"].loss is theirs
    assert replacements.uninstall() == ["peer.losses.loss", "peer.trainer.loss_fn"]
    assert losses.loss is theirs
    assert sys.modules["peer.trainer"].loss_fn is theirs
    with pytest.raises(RuntimeError, match="not installed"):
        replacements.original(ours)


def test_undone_in_modules_imported_since(losses: ModuleType, fake_package: Fake) -> None:
    replacements = Replacements("peer", {"peer.losses": {"loss": ours}})
    replacements.install()
    late = fake_package("peer.late", loss=losses.loss)
    replacements.uninstall()
    assert late.loss is theirs


def test_installed_once(losses: ModuleType) -> None:
    replacements = Replacements("peer", {"peer.losses": {"loss": ours}})
    replacements.install()
    with pytest.raises(RuntimeError, match="already installed"):
        replacements.install()
    replacements.uninstall()
    assert replacements.uninstall() == []
    assert losses.loss is theirs


@pytest.mark.parametrize(
    ("functions", "error"),
    [
        ({"peer.losses": {"loss": ours, "newer": ours}}, AttributeError),
        ({"peer.losses": {"loss": ours}, "peer.newer": {"loss": ours}}, ImportError),
    ],
    ids=["function", "module"],
)
def test_what_the_package_lacks_is_an_error_and_nothing_is_replaced(
    losses: ModuleType, functions: dict[str, dict[str, object]], error: type[Exception]
) -> None:
    with pytest.raises(error):
        Replacements("peer", functions).install()
    assert losses.loss is theirs
    replacements = Replacements("peer", functions, skip_missing=True)
    assert replacements.install() == ["peer.losses.loss", "peer.trainer.loss_fn"]
    replacements.uninstall()


def test_nothing_of_it_there(losses: ModuleType) -> None:
    with pytest.raises(AttributeError, match="none of the functions"):
        Replacements("peer", {"peer.losses": {"newer": ours}}, skip_missing=True).install()


def test_package_that_is_not_installed() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_trainer"):
        Replacements("no_such_trainer", {"no_such_trainer.losses": {"loss": ours}}, skip_missing=True).install()
