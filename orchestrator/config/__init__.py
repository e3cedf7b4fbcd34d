"""What is a run told before it starts: the config, read from YAML, checked, and written as YAML.

Imports go one way: suggestions, section, places, the sections by subject (training, batch_size, controlling,
optimization, execution, tracking, and cluster between kubernetes_names and worker_pods), combinations, run_config,
yaml_writer, yaml_reader, plugins, error_messages, load, differences.
"""

from orchestrator.config.load import load_config
from orchestrator.config.run_config import RunConfig
from orchestrator.config.yaml_writer import to_yaml

__all__ = ["RunConfig", "load_config", "to_yaml"]
