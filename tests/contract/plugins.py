"""The factories of one's own that the contract suites are asked to test, by kind: see ``conftest``."""

KINDS = ("policy", "rule", "estimator", "optimizer")
PLUGINS: dict[str, list[str]] = {kind: [] for kind in KINDS}  # "module:factory", as a config names it
