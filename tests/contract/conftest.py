"""The contract suites also test what is not built in::

    python -m pytest tests/contract --policy my_package.policies:mine --rule my_package.rules:mine

Each option takes a ``module:factory``, as the config does, and may be given several times.
"""

import pytest

from tests.contract.plugins import KINDS, PLUGINS


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("contract", "what the contract suites test besides everything that is built in")
    for kind in KINDS:
        group.addoption(
            f"--{kind}", action="append", default=[], metavar="MODULE:FACTORY", help=f"a {kind} of your own"
        )


def pytest_configure(config: pytest.Config) -> None:
    # Before the test modules are imported, which read the lists for their parameters.
    for kind in KINDS:
        PLUGINS[kind] += [name for name in config.getoption(f"--{kind}", default=[]) if name not in PLUGINS[kind]]
