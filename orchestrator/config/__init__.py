"""What is a run told before it starts: the config, read from YAML, checked, and written as YAML.

Imports go one way: suggestions, section, the sections by subject (training, batch_size, optimization, execution,
tracking, and cluster with kubernetes_names before and worker_pods after it), run_config, yaml_writer, yaml_reader,
plugins, error_messages, load.
"""

from orchestrator.config.load import load_config
from orchestrator.config.run_config import RunConfig
from orchestrator.config.yaml_writer import to_yaml

__all__ = ["RunConfig", "load_config", "to_yaml"]
